"""Whether a new model is better than the live one: the rule, what is known before, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipeline.commands import command
from pipeline.config import Config
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.files import read_json, write_json
from pipeline.live import Inputs, Live, changes, changes_beside, inputs_of, read_live

MARGIN = 2.0  # standard errors, of many examples
WIDEST = 10.0

Outcome = Literal["published", "not_better", "skipped"]
EXIT_CODES: dict[Outcome, int] = {"published": 0, "not_better": 3, "skipped": 4}


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


@dataclass(frozen=True)
class Matter:
    """What is to be decided, and what is known of it before anything is trained.

    Attributes:
        news: what a new model would be made of that the live one was not; none where nothing has to be decided.
        path: where the record is kept.
    """

    inputs: Inputs
    live: Live | None
    news: tuple[str, ...]
    record: Record
    path: Path

    @property
    def repo(self) -> str:
        return self.inputs.config.publish.repo

    def settled(self, margin: float) -> Decision | None:
        """The decision, where nothing has to be trained for it."""
        live, record = self.live, self.record
        if record.state == "better":  # it has only to be finished
            return None
        if live and not self.news:
            reason = f"neither base, data nor settings of the model changed since {live.head[:12]}, which is live"
            if beside := changes_beside(live, self.inputs):
                reason = (
                    f"of what makes the model nothing changed since {live.head[:12]}, which is live; "
                    f"{', '.join(beside)} did, and for that run: {command('run', 'CONFIG')}"
                )
            return Decision("skipped", self.repo, reason, margin)
        if live is None or record.live != live.model:
            return None
        if record.state == "not_better" and not better(record.comparison, margin):
            reason = f"{tell(record.comparison, margin)} (measured before, on the same inputs)"
            return Decision("not_better", self.repo, reason, margin, self.news, record.comparison)
        if record.state == "published":
            reason = f"the model made of this was published before, and is not live: {record.url}"
            return Decision("skipped", self.repo, reason, margin, self.news)
        return None

    def remember(self, told: dict) -> None:
        """Keep what was decided on another machine, from the decision as JSON has it."""
        figures = told.get("comparison")
        if told["outcome"] == "published" or (told["outcome"] == "not_better" and figures):
            live = self.live and self.live.model
            made = {"state": told["outcome"], "comparison": figures, "url": told.get("url")}
            replace(self.record, live=live, **made).write(self.path)


def look(config: Config, root: str | Path) -> Matter:
    """What is to be decided by a retraining, from the repository, the inputs and the record under `root`."""
    live, inputs = read_live(config.publish.repo), inputs_of(config)
    path = Path(root) / f".{config.name}.retraining.json"
    record = Record.read(path)
    if (record.repo, record.inputs) != (config.publish.repo, inputs.to_dict()):
        record = Record(config.publish.repo, inputs.to_dict())
    return Matter(inputs, live, changes(live, inputs) if live else ("there is no live model yet",), record, path)


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
