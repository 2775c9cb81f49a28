"""The second measurement of a release: each model is loaded in a fresh process, and its perplexity is compared.

How near is the same figure? Weights and tokens are the same to the bit, so its standard error has no part in it: what
differs is how and in which order is summed, by kernels, threads, batches and devices. That moves single losses both
ways, and the mean of hundreds of them by some tenths of a percent at most. `TOLERANCE` is above that, and below what
would matter to anybody: it is half of what int8 may lose. What moves a perplexity by less is not found by measuring.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.catalog import is_one_file
from pipeline.config.schema import REPO_ID, Config
from pipeline.data import load_examples, write_examples
from pipeline.data.sources import is_builtin, names_a_file
from pipeline.errors import UserError
from pipeline.evaluation.model_result import GENERAL, HELD_OUT, TEXTS
from pipeline.evaluation.results import Data
from pipeline.inference.loaders import DEQUANTIZED, default_loader
from pipeline.models.checkpoint_files import read_config
from pipeline.models.safe_loading import check_config
from pipeline.system.files import read_json, write_json
from pipeline.system.libraries import MEASURING, versions
from pipeline.system.process_environment import user_environment, with_own_package
from pipeline.verification.findings import Finding, outdated, right, unknown, wrong
from pipeline.verification.lineage_claims import ADAPTER, ROOT, Claims
from pipeline.verification.location import Place, Tell
from pipeline.verification.measure_process import DAMAGED, MISSING, OUTDATED
from pipeline.verification.remake_command import how_to_make
from pipeline.workflow.workspace import Workspace

TOLERANCE = 0.01  # of a perplexity
LONGEST_REASON = 160  # characters; libraries list all that they do know


@dataclass(frozen=True)
class Texts:
    """What is measured on.

    Attributes:
        config: the run's, with sources as they are found here.
        workspace: holds the held-out examples.
        names: of the texts that can be had.
        problems: text -> why it cannot be had.
    """

    config: Config
    workspace: Workspace
    names: tuple[str, ...]
    problems: dict[str, str]


@dataclass
class Cuts:
    """Which texts models cut into the tokens that they were measured on, and which into others.

    All models of a release have one tokenizer. Where another Python has other texts, or another library other tokens,
    that is so for all of them; where it is so for some, their tokenizer was changed.
    """

    same: set[str] = field(default_factory=set)
    other: list[tuple[str, str]] = field(default_factory=list)  # (model, text)

    def findings(self) -> Iterator[Finding]:
        for model, text in self.other:
            subject = f"{model}, {TEXTS[text]} text"
            if text in self.same:
                yield wrong("measured", subject, "cut into other tokens than by the other models: another tokenizer")
            else:
                yield unknown(
                    "measured",
                    subject,
                    "cut into other tokens here than when it was measured (another Python?), so not compared",
                )


def measure_models(claims: Claims, place: Place, models: list[str]) -> Iterator[Finding]:
    """A line for every model and text: what was measured, and whether it is what the release says."""
    with tempfile.TemporaryDirectory(prefix="tunepress-verify-") as scratch:
        texts = find_texts(claims, place, Path(scratch) / "texts")
        for text, problem in texts.problems.items():
            yield unknown("measured", f"{TEXTS[text]} text", problem)
        cut = Cuts()
        for model in models:
            if refusal := refused(claims, place, model):
                yield wrong("measured", model, refusal)
            else:
                yield from _measured(claims, place, model, texts, Path(scratch), cut)
        yield from cut.findings()


def find_texts(claims: Claims, place: Place, folder: Path) -> Texts:
    """The texts that figures were measured on, as far as they can be had again.

    Files on this machine are read only for a run that lies here: a lineage from elsewhere is not to name them.
    """
    config = claims.config
    if place.run:
        own = place.run.config()
        config = Config.model_validate({**dict(config), "data": own.data, "evaluate": own.evaluate or config.evaluate})
    workspace, problems = Workspace(folder), {}
    workspace.data.mkdir(parents=True)
    if claims.results.texts:
        write_json(workspace.measurements / "texts.json", claims.results.texts.to_json())
    measured = [text for text in TEXTS if any(text in claims.results[model].quality for model in claims.models)]
    wanted = measured if config.evaluate else []
    if HELD_OUT in wanted and (problem := _bring_held_out(claims, place, config, workspace)):
        problems[HELD_OUT] = problem
    if GENERAL in wanted and not place.run and config.evaluate and not config.evaluate.general.startswith("builtin:"):
        source = config.evaluate.general
        problems[GENERAL] = f"the file {source} is not part of a release; verify the run's folder to measure on it"
    return Texts(config, workspace, tuple(t for t in wanted if t not in problems), problems)


def _bring_held_out(claims: Claims, place: Place, config: Config, workspace: Workspace) -> str | None:
    """Put the held-out examples into `workspace`; why they cannot be had, if so."""
    data = claims.results.data or Data()
    write_json(workspace.measurements / "data.json", {"template": data.template})
    kept = workspace.data / "held_out.jsonl"
    if place.run and (place.run.data / kept.name).is_file():
        shutil.copyfile(place.run.data / kept.name, kept)
        return None
    source = config.data.source if config.data else ""
    try:
        on_hub = bool(REPO_ID.match(source)) and not names_a_file(source) and bool(data.revision)
        if not on_hub and not is_builtin(source):
            return f"the file {source} is not part of a release; verify the run's folder to measure on it"
        place.tell(0, 1, f"reading {source}")
        assert config.data is not None, "its source was looked at above"
        pinned = config.data.model_copy(update={"revision": data.revision}) if on_hub else config.data
        write_examples(kept, load_examples(pinned).held_out)
    except UserError as error:
        return str(error)
    return None


def refused(claims: Claims, place: Place, model: str) -> str | None:
    """Why a model is not even begun with: it names code, or a format that tunepress never writes."""
    folder = place.folder / claims.prefix(model)
    if is_one_file(model) or model == ADAPTER:
        return None
    try:
        config = read_config(folder)
        check_config(folder.name, {key: value for key, value in config.items() if key != "quantization_config"})
    except UserError as error:
        return f"not loaded: {error}"
    quantization = config.get("quantization_config")
    if model == ROOT and quantization:
        return "not loaded: the full-precision model is quantized"
    return None


def _measured(claims: Claims, place: Place, model: str, texts: Texts, scratch: Path, cut: Cuts) -> Iterator[Finding]:
    if problem := _cannot_be_had(claims, place, model):
        yield unknown("measured", model, problem)
        return
    request = request_for(claims, place, model, texts)
    found = in_fresh_process(request, scratch, lambda d, t, what: place.tell(d, t, f"{model}: {what}"))
    yield from judged(claims, place, model, found, cut)


def _cannot_be_had(claims: Claims, place: Place, model: str) -> str | None:
    """What it takes to measure a model and is not in the release."""
    if (is_one_file(model) or model == ADAPTER) and claims.reference is None:
        return "needs the full-precision model's tokenizer, which is not in this release"
    if claims.results[model].loader == DEQUANTIZED and not claims.has_root:
        return "was measured by its dequantized weights, which takes the full-precision model"
    return None


def request_for(claims: Claims, place: Place, model: str, texts: Texts) -> dict:
    """Return what `pipeline.verification.measure_process` is told of a model."""
    folder, reference, file = place.folder / claims.prefix(model), claims.reference, claims.file_of(model)
    return {
        "model": model,
        "folder": str(folder),
        "file": str(place.folder / file) if is_one_file(model) and file else None,
        "reference": str(place.folder / claims.prefix(reference)) if reference else None,
        "loader": claims.results[model].loader or default_loader(model),
        "config": texts.config.model_dump(mode="json"),
        "workspace": str(texts.workspace.folder),
        "texts": [text for text in texts.names if text in claims.results[model].quality],
    }


def judged(claims: Claims, place: Place, model: str, found: dict, cut: Cuts) -> Iterator[Finding]:
    """What follows from what the worker found; `cut` keeps what is only to be told when all models were looked at."""
    if "problem" in found:
        yield _failed(claims, place, model, found)
        return
    yield from _compared(claims, model, found, cut)
    if not found["quality"] and not found["problems"]:
        yield right("measured", model, "loads and runs")


def in_fresh_process(request: dict, scratch: Path, tell: Tell) -> dict:
    """What `pipeline.verification.measure_process` found; `problem` and `reason` where that is nothing."""
    asked, result = scratch / "request.json", scratch / "result.json"
    result.unlink(missing_ok=True)
    write_json(asked, request)
    tell(0, 1, "loading")
    plain = user_environment() | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "pipeline.verification.measure_process", str(asked), str(result)]
    with open(scratch / "log", "w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=with_own_package(plain),
        )
        try:
            for line in child.stdout or ():
                if report := _report(line):
                    tell(*report)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        if code or not result.is_file():
            log.seek(0)
            last = (log.read().strip().splitlines() or [f"exit code {code}"])[-1]
            reason = f"killed (signal {-code}), perhaps for want of memory" if code < 0 else last
            return {"problem": "killed" if code < 0 else "failed", "reason": reason}
    return read_json(result, {})


def _report(line: str) -> tuple[int, int, str] | None:
    try:
        done, total, what = json.loads(line)
    except (ValueError, TypeError):
        return None  # a library's own chatter
    return done, total, str(what)


def _failed(claims: Claims, place: Place, model: str, found: dict) -> Finding:
    """Damage, or other libraries than it was made for? Its files are as the lineage has them, or it were not loaded."""
    problem, reason = found["problem"], found["reason"]
    reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
    again = how_to_make(claims, place, model)
    if problem == DAMAGED:
        return wrong("measured", model, f"damaged, though its hash is the lineage's: {reason}; make it again: {again}")
    if problem == MISSING:
        return unknown("measured", model, reason)
    if problem == "killed":
        return unknown("measured", model, reason)
    changed = _other_versions(claims)
    if problem == OUTDATED or changed:
        since = f" (made with {changed})" if changed else ""
        return outdated(
            "measured",
            model,
            f"not damaged, but made for other versions of the libraries{since}: {reason}; make it again: {again}",
        )
    return wrong("measured", model, f"does not load or run: {reason}; make it again: {again}")


def _other_versions(claims: Claims) -> str:
    """The libraries that load models, where they are others than those it was made with."""
    names = MEASURING
    now, then = versions(*names), claims.made_with
    return ", ".join(f"{n} {then[n]}, now {now[n]}" for n in names if n in then and n in now and then[n] != now[n])


def _compared(claims: Claims, model: str, found: dict, cut: Cuts) -> Iterator[Finding]:
    for text, problem in found["problems"].items():
        yield unknown("measured", f"{model}, {TEXTS[text]} text", problem)
    for text, figures in found["quality"].items():
        claimed, now = claims.results[model].on(text), figures["perplexity"]
        subject = f"{model}, {TEXTS[text]} text"
        value = claimed.perplexity.value if claimed.perplexity else 0
        if not value > 0:  # which NaN is not, either
            yield wrong("measured", subject, "the lineage has no perplexity that is a number")
        elif claimed.digest != figures["digest"]:
            cut.other.append((model, text))
        else:
            cut.same.add(text)
            yield _beside(subject, now, value)


def _beside(subject: str, now: float, claimed: float) -> Finding:
    if abs(now / claimed - 1) <= TOLERANCE:
        return right("measured", subject, f"perplexity {now:.5g}, claimed {claimed:.5g}")
    return wrong("measured", subject, f"perplexity is {now:.5g}, and the lineage and its cards claim {claimed:.5g}")
