"""The second measurement of a release: each model is loaded in a fresh process, and its perplexity is compared.

Weights and tokens are the same to the bit, so the standard error plays no part. Kernels, threads, batches and devices
only change the order of summation, which moves the mean loss by some tenths of a percent at most. `TOLERANCE` is
above that, and half of what int8 may lose. A change that moves a perplexity by less is not found by measuring.
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
from pipeline.config.engines import TUNEPRESS
from pipeline.config.schema import REPO_ID, Config
from pipeline.data import load_examples, write_examples
from pipeline.data.sources import is_builtin, names_a_file
from pipeline.data.splitting import answers_of_split
from pipeline.errors import UserError
from pipeline.evaluation.data_result import Data
from pipeline.evaluation.model_result import GENERAL, HELD_OUT, TEXTS, VariantSettings
from pipeline.inference.loaders import DEQUANTIZED, default_loader, missing_packages
from pipeline.models.checkpoint_files import read_config
from pipeline.models.safe_loading import check_beside, check_config
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
LONGEST_REASON = 160  # characters; some libraries list everything that they support


@dataclass(frozen=True)
class Texts:
    """The texts to measure on.

    Attributes:
        config: the configuration of the run, with the sources on this machine.
        workspace: a workspace with the held-out examples.
        names: names of the texts that are available.
        problems: text -> the reason why it is not available.
    """

    config: Config
    workspace: Workspace
    names: tuple[str, ...]
    problems: dict[str, str]


@dataclass
class Cuts:
    """The texts that give the same tokens as in the first measurement, and those that give others.

    All models of a release have one tokenizer. Another Python has other texts, and another library other tokens, for
    all of them. If only some models differ, their tokenizer was changed.
    """

    same: set[str] = field(default_factory=set)
    other: list[tuple[str, str]] = field(default_factory=list)  # (model, text)

    def findings(self) -> Iterator[Finding]:
        """Yield a finding for each model and text with other tokens."""
        for model, text in self.other:
            subject = f"{model}, {TEXTS[text]} text"
            if text in self.same:
                yield wrong("measured", subject, "other tokens than with the other models: another tokenizer")
            else:
                yield unknown(
                    "measured",
                    subject,
                    "not compared: other tokens here than in the first measurement (another Python?)",
                )


def measure_models(claims: Claims, place: Place, models: list[str]) -> Iterator[Finding]:
    """Yield a finding for each model and text: does the perplexity agree with the claim?"""
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
    """Return the texts of the first measurement that are available here.

    Files on this machine are read only if the run is on it too. A lineage from elsewhere must not name them.
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
        problems[GENERAL] = f"the file {config.evaluate.general} is not part of a release. Try: verify the run's folder"
    return Texts(config, workspace, tuple(t for t in wanted if t not in problems), problems)


def _bring_held_out(claims: Claims, place: Place, config: Config, workspace: Workspace) -> str | None:
    """Put the held-out examples into `workspace`. Return the reason if they are not available."""
    data = claims.results.data or Data()
    write_json(workspace.measurements / "data.json", {"template": data.template})
    kept = workspace.data / "held_out.jsonl"
    if place.run and (place.run.data / kept.name).is_file():
        shutil.copyfile(place.run.data / kept.name, kept)
        return None
    revisions: list[str | None] = []
    try:
        if config.data is None:
            return "the training data is not recorded. Try: verify the run's folder"
        for part, read in zip(config.data.all_parts, data.parts.values() or [data], strict=False):
            on_hub = REPO_ID.match(part.source) and not names_a_file(part.source) and read.revision
            if not on_hub and not is_builtin(part.source):
                return f"the file {part.source} is not part of a release. Try: verify the run's folder"
            revisions.append(read.revision if on_hub else None)
        place.tell(0, 1, f"reading {config.data.named}")
        answers = answers_of_split(data.split_by, config.train.loss_on)
        write_examples(kept, load_examples(config.data.at_revisions(revisions), answers).held_out)
    except UserError as error:
        return str(error)
    return None


def refused(claims: Claims, place: Place, model: str) -> str | None:
    """Return the reason why a model must not be loaded: it names code or other files, or the root is quantized."""
    folder = place.folder / claims.prefix(model)
    if is_one_file(model) or model == ADAPTER:
        return None
    try:
        config = read_config(folder)
        check_config(folder.name, {key: value for key, value in config.items() if key != "quantization_config"})
        check_beside(folder)
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
    """Return the reason why a model cannot be measured with the files of the release."""
    if (is_one_file(model) or model == ADAPTER) and claims.reference is None:
        return "not measured: needs the full-precision model's tokenizer, which is not in this release"
    if claims.results[model].loader == DEQUANTIZED and not claims.has_root:
        return "not measured: its dequantized weights need the full-precision model"
    settings = claims.results[model].variant or VariantSettings()
    if lacks := missing_packages(model, settings.packing, TUNEPRESS):
        return f"not measured: needs {' and '.join(lacks)}"
    return None


def request_for(claims: Claims, place: Place, model: str, texts: Texts) -> dict:
    """Return the request about a model for `pipeline.verification.measure_process`."""
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
        # Releases of earlier versions were measured on other parts of the same texts.
        "by_cluster": [text for text, found in claims.results[model].quality.items() if found.clusters is not None],
    }


def judged(claims: Claims, place: Place, model: str, found: dict, cut: Cuts) -> Iterator[Finding]:
    """Yield the findings that follow from the worker's answer. `cut` keeps those that need all models."""
    if "problem" in found:
        yield _failed(claims, place, model, found)
        return
    yield from _compared(claims, model, found, cut)
    if not found["quality"] and not found["problems"]:
        yield right("measured", model, "loads and runs")


def in_fresh_process(request: dict, scratch: Path, tell: Tell) -> dict:
    """Return the answer of `pipeline.verification.measure_process`: figures, or `problem` and `reason`."""
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
            reason = f"killed (signal {-code}), perhaps out of memory" if code < 0 else last
            return {"problem": "killed" if code < 0 else "failed", "reason": reason}
    return read_json(result, {})


def _report(line: str) -> tuple[int, int, str] | None:
    try:
        done, total, what = json.loads(line)
    except (ValueError, TypeError):
        return None  # a line of a library
    return done, total, str(what)


def _failed(claims: Claims, place: Place, model: str, found: dict) -> Finding:
    """Return the finding about a model that cannot be measured: damaged, or made for other libraries."""
    problem, reason = found["problem"], found["reason"]
    reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
    again = f"Try: {how_to_make(claims, place, model)}"
    if problem == DAMAGED:
        return wrong("measured", model, f"damaged, although its hash agrees with the lineage: {reason}. {again}")
    if problem in (MISSING, "killed"):
        return unknown("measured", model, reason)
    changed = _other_versions(claims)
    if problem == OUTDATED or changed:
        since = f" (made with {changed})" if changed else ""
        return outdated(
            "measured",
            model,
            f"not damaged, but made for other versions of the libraries{since}: {reason}. {again}",
        )
    return wrong("measured", model, f"does not load or run: {reason}. {again}")


def _other_versions(claims: Claims) -> str:
    """Return the libraries that load models and have other versions here than in the lineage."""
    now, then = versions(*MEASURING), claims.made_with
    return ", ".join(f"{n} {then[n]}, now {now[n]}" for n in MEASURING if n in then and n in now and then[n] != now[n])


def _compared(claims: Claims, model: str, found: dict, cut: Cuts) -> Iterator[Finding]:
    for text, problem in found["problems"].items():
        yield unknown("measured", f"{model}, {TEXTS[text]} text", problem)
    for text, figures in found["quality"].items():
        claimed, now = claims.results[model].on(text), figures["perplexity"]
        subject = f"{model}, {TEXTS[text]} text"
        value = claimed.perplexity.value if claimed.perplexity else 0
        if not value > 0:  # false for NaN too
            yield wrong("measured", subject, "the lineage has no valid perplexity")
        elif claimed.digest != figures["digest"]:
            cut.other.append((model, text))
        else:
            cut.same.add(text)
            yield _beside(subject, now, value)


def _beside(subject: str, now: float, claimed: float) -> Finding:
    if abs(now / claimed - 1) <= TOLERANCE:
        return right("measured", subject, f"perplexity {now:.5g}, claimed {claimed:.5g}")
    return wrong("measured", subject, f"perplexity is {now:.5g}; lineage and cards claim {claimed:.5g}")
