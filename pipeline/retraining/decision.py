"""Whether a new model is better than the live one: the rule, what is known before, and what came of it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config.schema import Config, TrainingRun
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.evaluation.results import Comparison
from pipeline.evaluation.student_t import MARGIN, quantile
from pipeline.publishing.published_model import PublishedModel, read_published, with_full_model
from pipeline.retraining.input_changes import Inputs, changes, changes_beside, inputs_of, made_with
from pipeline.system.command_names import command
from pipeline.system.files import fingerprint, read_json, write_json
from pipeline.workflow.baseline import own_weights
from pipeline.workflow.stages import merge, train
from pipeline.workflow.workspace import Workspace

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
    comparison: Comparison | None = None
    url: str | None = None
    commit: str | None = None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]


@dataclass(frozen=True)
class Record:
    """What is known of the last retraining: of these inputs, for this repository and its live model, it came so far.

    Attributes:
        job: the Job that it was started as, and whose end was not read: its id, namespace and url.
    """

    repo: str = ""
    inputs: dict = field(default_factory=dict)
    live: str | None = None
    state: Literal["new", "running", "better", "not_better", "published"] = "new"
    comparison: Comparison | None = None
    url: str | None = None
    job: dict | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record at `path`; an empty one where there is none that can be read."""
        try:
            told = read_json(path, {})
            figures = told.get("comparison")
            return cls(**told | {"comparison": Comparison.model_validate(figures) if figures else None})
        except (WorkspaceError, AttributeError, TypeError, OSError, ValidationError):
            return cls()

    def write(self, path: Path) -> None:
        write_json(path, asdict(self) | {"comparison": self.comparison and self.comparison.to_json()})


@dataclass(frozen=True)
class Matter:
    """What is to be decided, and what is known of it before anything is trained.

    Attributes:
        config: as it was asked for.
        news: what a new model would be made of that the live one was not; none where nothing has to be decided.
        folder: of the run.
    """

    config: TrainingRun
    inputs: Inputs
    live: PublishedModel | None
    news: tuple[str, ...]
    record: Record
    folder: Path

    @property
    def repo(self) -> str:
        return self.inputs.config.publish.target

    @property
    def path(self) -> Path:
        """Where the record is kept."""
        return _record_path(self.folder)

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
                    f"{', '.join(beside)} did, and {self._way_to_the_rest(live)}"
                )
            return Decision("skipped", self.repo, reason, margin)
        if live is None or record.live != live.model:
            return None
        if record.state == "not_better" and record.comparison and not better(record.comparison, margin):
            reason = f"{tell(record.comparison, margin)} (measured before, on the same inputs)"
            return Decision("not_better", self.repo, reason, margin, self.news, record.comparison)
        if record.state == "published":
            reason = f"the model made of this was published before, and is not live: {record.url}"
            return Decision("skipped", self.repo, reason, margin, self.news)
        return None

    def _way_to_the_rest(self, live: PublishedModel) -> str:
        """How to make what is published beside the live model, without another model coming of it."""
        options = self._options_of_the_live_model(live)
        if options is None:
            return (
                f"{self.folder} cannot make that without training again, which is compared before it is published: "
                "use --force"
            )
        return f"for that run: {command('run', 'CONFIG')}{options}"

    def _options_of_the_live_model(self, live: PublishedModel) -> str | None:
        """Options with which `tunepress run` keeps the model in the run's folder; None where that is not the live one.

        The live model was made of commits, where the configuration may name none.
        """
        made, workspace, config = made_with(live), Workspace(self.folder), self.config
        if own_weights(workspace) != live.weights:
            return None
        pinned = {name: getattr(made, name).revision for name in ("model", "data")}
        update = {n: getattr(config, n).model_copy(update={"revision": r}) for n, r in pinned.items()}
        config = config.model_copy(update=update)
        for name, stage in (("train", train), ("merge", merge)):
            if not workspace.holds(name, fingerprint(stage.depends(config, workspace, ()))):
                return None
        asked = {n: r for n, r in pinned.items() if getattr(self.config, n).revision != r}
        root = "" if self.folder.parent == Path("runs") else f" --runs {shlex.quote(str(self.folder.parent))}"
        return root + "".join(f" --set {name}.revision={r or 'null'}" for name, r in asked.items())

    def remember(self, told: dict) -> Matter:
        """Keep what was decided in a Job, from the decision as JSON has it, for the model that it was compared with."""
        figures = Comparison.model_validate(told["comparison"]) if told.get("comparison") else None
        if told["outcome"] == "published" or (told["outcome"] == "not_better" and figures):
            there = read_published(self.repo, figures.compared_with.commit) if figures else None
            made = {"state": told["outcome"], "comparison": figures, "url": told.get("url")}
            return self.keep(**made, live=there and there.model, job=None)
        return self.keep(job=None)

    def keep(self, **known: Any) -> Matter:
        """Keep more in the record."""
        record = replace(self.record, **known)
        record.write(self.path)
        return replace(self, record=record)


def _record_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.retraining.json")


def look(config: TrainingRun, root: str | Path) -> Matter:
    """What is to be decided by a retraining, from the repository, the inputs and the record under `root`."""
    repo, inputs = config.publish.target, inputs_of(config)
    live = with_full_model(read_published(repo))
    folder = Path(root) / config.name
    record = Record.read(_record_path(folder))
    if (record.repo, record.inputs) != (repo, inputs.to_dict()):
        record = Record(repo, inputs.to_dict())
    news = changes(live, inputs) if live else ("there is no live model yet",)
    return Matter(config, inputs, live, news, record, folder)


def check(config: Config, margin: float) -> TrainingRun:
    """Return the configuration if a model can be retrained by it.

    Raises:
        ConfigError: if it has no data or no repository, trains on its own result, or the margin is out of range.
    """
    if not isinstance(config, TrainingRun) or config.publish.repo is None:
        missing = "data" if config.data is None else "publish.repo"
        raise ConfigError(f"{missing}: not set; retraining trains on data, and publishes what is better")
    if config.model.source.lower() == config.publish.repo.lower():
        raise ConfigError(
            f"model.source {config.model.source}: is publish.repo too, so that each model would be trained from the "
            "last one; publish to another repository"
        )
    if not 0 <= margin <= WIDEST:
        raise ConfigError(f"margin {margin:g}: is not from 0 to {WIDEST:g} standard errors")
    return config


def better(comparison: Comparison, margin: float) -> bool:
    """Is the new model's loss lower by more than `margin` standard errors of the difference?"""
    difference = comparison.difference
    return difference.value < -quantile(margin, comparison.prompts) * difference.stderr


def tell(comparison: Comparison, margin: float) -> str:
    """A comparison in one line."""
    gap = comparison.difference
    direction = "lower" if gap.value < 0 else "higher"
    verdict = "better" if better(comparison, margin) else "not better"
    return (
        f"{verdict}: the loss is {direction} by {abs(gap.value):.4f} ± {gap.stderr:.4f} {comparison.unit} on "
        f"the answers to {comparison.prompts} prompts, and counts as better if lower by more than "
        f"{quantile(margin, comparison.prompts):.2f} standard errors"
    )
