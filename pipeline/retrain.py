"""Train again, and publish only what is better than the model that the repository has.

Both models are measured in this run, on held-out examples that neither was trained on, and compared token by
token; the new one is better where its loss is lower by more than `margin` standard errors of the difference, or
where these are of few examples, by as many more as make it no likelier that chance decides.
Nothing is published before that is decided, and then everything in one commit.

What was decided is kept beside the run's folder, so that asking again with the same inputs trains nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipeline.config import Config
from pipeline.data import load_examples
from pipeline.errors import ConfigError, StageFailed, UserError, WorkspaceError
from pipeline.events import Events
from pipeline.files import read_json, write_json
from pipeline.live import Inputs, Live, changes, forget, inputs_of, note, own_weights, read_live, untouched
from pipeline.reporter import Reporter
from pipeline.run import Steps, preflight
from pipeline.stages.compare import RESULT
from pipeline.workspace import Workspace

MARGIN = 2.0  # standard errors, of many examples
WIDEST = 10.0
ROUNDS = 3  # how often others may publish while this run compares

Outcome = Literal["published", "not_better", "skipped"]
EXIT_CODES: dict[Outcome, int] = {"published": 0, "not_better": 3, "skipped": 4}


class Busy(UserError):
    """Another retraining of the same repository is under way."""

    exit_code = 75  # EX_TEMPFAIL: try again later


@dataclass(frozen=True)
class Decision:
    """What came of a retraining.

    Attributes:
        reason: one line for people.
        changes: what the new model was made of that the live one was not.
        comparison: the figures of both models, as the lineage has them under `results.retraining`; None where
            there was nothing to compare.
        url, commit: what was published; None where nothing was.
    """

    outcome: Outcome
    repo: str
    reason: str
    margin: float = MARGIN
    changes: tuple[str, ...] = ()
    comparison: dict | None = None
    url: str | None = None
    commit: str | None = None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]


@dataclass(frozen=True)
class Record:
    """What is known of the last retraining: of these inputs, for this repository and its live model, it came so far."""

    repo: str = ""
    inputs: dict = field(default_factory=dict)
    live: str | None = None
    state: Literal["new", "running", "better", "not_better", "published"] = "new"
    comparison: dict | None = None
    url: str | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record at `path`; an empty one where there is none that can be read."""
        try:
            return cls(**read_json(path, {}))
        except (WorkspaceError, TypeError, OSError):
            return cls()

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def retrain(
    config: Config,
    root: str | Path = "runs",
    *,
    margin: float = MARGIN,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Decision:
    """Retrain a published model.

    Args:
        root: folder under which the run's folder lies.
        margin: standard errors of the difference by which the new model's loss has to be lower, 0 to 10.
        force: train anew where nothing has changed, or where it was decided before.

    Raises:
        Busy: where another retraining of the repository is under way on this machine.
        UserError: as `pipeline.run` does; the repository is then as it was.
    """
    check(config, margin)
    with _alone(config.publish.repo):
        preflight(config)
        live, inputs = read_live(config.publish.repo), inputs_of(config)
        path = Path(root) / f".{config.name}.retraining.json"
        record = Record.read(path)
        if (record.repo, record.inputs) != (config.publish.repo, inputs.to_dict()):
            record = Record(config.publish.repo, inputs.to_dict())
        news = changes(live, inputs) if live else ("there is no live model yet",)
        if not force and (settled := _settled(config.publish.repo, live, record, news, margin)):
            return settled
        retraining = _Retraining(inputs, news, margin, path)
        fresh = force and record.state not in ("running", "better")  # one that was stopped goes on
        folder = Path(root) / config.name
        with (
            Workspace.claim(folder, inputs.config, fresh and folder.exists()) as workspace,
            Steps(inputs.config, workspace, reporter or Reporter()) as steps,
        ):
            return retraining.decide(workspace, steps, live, record)


def check(config: Config, margin: float) -> None:
    """Raise where this is nothing to retrain by."""
    if config.data is None or config.publish.repo is None:
        missing = "data" if config.data is None else "publish.repo"
        raise ConfigError(f"{missing}: not set; retraining trains on data, and publishes what is better")
    if config.model.source.lower() == config.publish.repo.lower():
        raise ConfigError(
            f"model.source {config.model.source}: is publish.repo too, so that each model would be trained from the "
            "last one; publish to another repository"
        )
    if not 0 <= margin <= WIDEST:
        raise ConfigError(f"margin {margin:g}: is not from 0 to {WIDEST:g} standard errors")


def better(comparison: dict, margin: float) -> bool:
    """Is the new model's loss lower by more than `margin` standard errors of the difference?"""
    difference = comparison["difference"]
    return difference["value"] < -quantile(margin, comparison["examples"]) * difference["stderr"]


def quantile(margin: float, examples: int) -> float:
    """How many standard errors, estimated from so many examples, chance exceeds as rarely as `margin` known ones.

    Student's t of examples - 1 degrees of freedom, at the probability that the normal distribution leaves beyond
    `margin`; by D. L. Wallace, Bounds on normal approximations to Student's and the chi-square distributions, 1959,
    to 0.001 for 15 degrees of freedom at a margin of 2.
    """
    freedom = examples - 1
    normal = margin * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(normal**2 / freedom))


@dataclass(frozen=True)
class _Retraining:
    """One retraining: what it is made of, and where is kept what came of it."""

    inputs: Inputs
    news: tuple[str, ...]
    margin: float
    path: Path

    def decide(self, workspace: Workspace, steps: Steps, live: Live | None, record: Record) -> Decision:
        """Train, compare, and publish what is better; compare again where others have published meanwhile."""
        if live:
            data = load_examples(self.inputs.config.data)  # too little to compare on should not be found out later
            untouched(data.held_out, data.fingerprint, live)
            del data
        # The commit is there already where only what comes after it was cut short.
        is_there = bool(live) and record.state == "better" and live.weights == own_weights(workspace)
        for attempt in range(ROUNDS):
            note(workspace, live, self.inputs)
            if not is_there:
                record = replace(record, live=live and live.model, state="running", comparison=None, url=None)
                record.write(self.path)
            for stage in ("train", "merge", *(() if is_there else ("compare",))):
                steps.do(stage)
            comparison = workspace.read_measurement(RESULT)
            if live and not is_there:
                is_better = better(comparison, self.margin)
                _tell(workspace, comparison, is_better)
                if not is_better:
                    replace(record, state="not_better", comparison=comparison).write(self.path)
                    forget(workspace)
                    return self._decision("not_better", live, comparison)
            steps.do("evaluate")
            variants = _all_variants(self.inputs.config, steps)
            record = replace(record, state="better", comparison=comparison)
            record.write(self.path)
            try:
                steps.do("publish", variants, again=True)
                break
            except StageFailed:
                now = read_live(self.inputs.config.publish.repo)
                is_ours = now and now.weights == own_weights(workspace)  # it is only tagging that failed
                if attempt == ROUNDS - 1 or is_ours or (now and now.model) == (live and live.model):
                    raise
                live, is_there = now, False
        done = workspace.ledger()["publish"].summary
        replace(record, state="published", url=done["url"]).write(self.path)
        forget(workspace)
        return replace(self._decision("published", live, comparison), url=done["url"], commit=done["commit"])

    def _decision(self, outcome: Outcome, live: Live | None, comparison: dict) -> Decision:
        figures = comparison if "difference" in comparison else None
        reason = tell(figures, self.margin) if figures else "the first model of this repository"
        return Decision(outcome, self.inputs.config.publish.repo, reason, self.margin, self.news, figures)


def tell(comparison: dict, margin: float) -> str:
    """A comparison in one line."""
    gap = comparison["difference"]
    direction = "lower" if gap["value"] < 0 else "higher"
    verdict = "better" if better(comparison, margin) else "not better"
    return (
        f"{verdict}: the loss is {direction} by {abs(gap['value']):.4f} ± {gap['stderr']:.4f} {comparison['unit']} on "
        f"{comparison['examples']} examples, and counts as better if lower by more than "
        f"{quantile(margin, comparison['examples']):.2f} standard errors"
    )


def _settled(repo: str, live: Live | None, record: Record, news: tuple[str, ...], margin: float) -> Decision | None:
    """The decision, where nothing has to be trained for it."""
    if record.state == "better":  # it has only to be finished
        return None
    if not news:
        reason = f"neither base, data nor configuration changed since {live.head[:12]}, which is live"
        return Decision("skipped", repo, reason, margin)
    if live is None or record.live != live.model:
        return None
    if record.state == "not_better" and not better(record.comparison, margin):
        reason = f"{tell(record.comparison, margin)} (measured before, on the same inputs)"
        return Decision("not_better", repo, reason, margin, news, record.comparison)
    if record.state == "published":
        reason = f"the model made of this was published before, and is not live: {record.url}"
        return Decision("skipped", repo, reason, margin, news)
    return None


def _all_variants(config: Config, steps: Steps) -> tuple[str, ...]:
    """Every variant that is asked for, made and measured.

    Raises:
        StageFailed: where one fails: what is live has it perhaps, and would lose it.
    """
    variants = tuple(spec.name for spec in config.quantize.variants)
    ready = steps.admitted(variants)
    steps.write_variants(tuple(v for v in variants if v not in ready))
    for variant in variants:
        steps.try_admit(variant)
    steps.raise_failures()
    return variants


def _tell(workspace: Workspace, comparison: dict, is_better: bool) -> None:
    """The decision as metrics beside the training's own."""
    figures = {name: comparison[name]["value"] for name in ("new", "live", "difference")}
    figures |= {"stderr": comparison["difference"]["stderr"], "decided": float(is_better)}
    step = workspace.read_measurement("training").get("steps", 0)
    name = workspace.config().name
    Events(workspace.events_path, name).metrics({f"retraining/{key}": value for key, value in figures.items()}, step)


@contextlib.contextmanager
def _alone(repo: str) -> Iterator[None]:
    """Keep other retrainings of a repository from running on this machine.

    Raises:
        Busy: where one does.
        WorkspaceError: where the lock cannot be written.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import constants

    folder = Path(constants.HF_HOME) / "tunepress"
    lock = FileLock(folder / f"retrain--{repo.replace('/', '--').lower()}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(
            f"{repo}: another retraining of it is running on this machine; try again when it has ended"
        ) from None
    except OSError as error:
        raise WorkspaceError(
            f"{folder}: cannot be written ({error.strerror}); set HF_HOME to a folder that can"
        ) from None
    try:
        yield
    finally:
        lock.release()
