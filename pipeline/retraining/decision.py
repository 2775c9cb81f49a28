"""Decision about a new model: the rule, the record of the last retraining, and the outcome."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config.schema import Config, TrainingRun
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.evaluation.cluster_errors import MARGIN
from pipeline.evaluation.results import Comparison
from pipeline.publishing.published_model import PublishedModel, read_published, with_full_model
from pipeline.retraining.input_changes import Inputs, changes, changes_beside, inputs_of, made_with
from pipeline.system.command_names import command
from pipeline.system.files import fingerprint, read_json, write_json
from pipeline.workflow.baseline import own_weights
from pipeline.workflow.stages import merge, train
from pipeline.workflow.workspace import Workspace

LARGEST_MARGIN = 10.0

Outcome = Literal["published", "not_better", "skipped"]
EXIT_CODES: dict[Outcome, int] = {"published": 0, "not_better": 3, "skipped": 4}


@dataclass(frozen=True)
class Decision:
    """The outcome of a retraining.

    Attributes:
        reason: one line for people.
        margin: standard errors by which the new model's loss had to be lower.
        changes: inputs of the new model that differ from those of the published model.
        comparison: figures of both models, as the lineage has them under `results.retraining`; None if there was
            nothing to compare.
        url, commit: of the published commit; None if nothing was published.
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
        """Return the exit code of the command."""
        return EXIT_CODES[self.outcome]


@dataclass(frozen=True)
class Record:
    """The record of the last retraining of a repository with these inputs.

    Attributes:
        live: digest of the published model that it was compared with.
        job: the Job that runs it and whose end was not read yet: its id, namespace and url.
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
        """Return the record in a file; an empty one if it cannot be read."""
        try:
            content = read_json(path, {})
            figures = content.get("comparison")
            return cls(**content | {"comparison": Comparison.model_validate(figures) if figures else None})
        except (WorkspaceError, AttributeError, TypeError, OSError, ValidationError):
            return cls()

    def write(self, path: Path) -> None:
        """Write the record to a file."""
        write_json(path, asdict(self) | {"comparison": self.comparison and self.comparison.to_json()})


@dataclass(frozen=True)
class Matter:
    """A possible retraining: its inputs, the published model, and the record, before anything is trained.

    Attributes:
        config: the configuration, before commits are filled in.
        live: the published model.
        news: inputs of a new model that differ from those of the published model.
        folder: the run's folder.
    """

    config: TrainingRun
    inputs: Inputs
    live: PublishedModel | None
    news: tuple[str, ...]
    record: Record
    folder: Path

    @property
    def repo(self) -> str:
        """Return the repository that is published to."""
        return self.inputs.config.publish.target

    @property
    def path(self) -> Path:
        """Return the path of the record."""
        return _record_path(self.folder)

    def settled(self, margin: float) -> Decision | None:
        """Return the decision if it needs no training, else None."""
        live, record = self.live, self.record
        if record.state == "better":  # only publishing is left
            return None
        if live and not self.news:
            reason = f"base, data and settings of the model are unchanged since the published commit {live.head[:12]}"
            if beside := changes_beside(live, self.inputs):
                reason = f"{reason}, but {', '.join(beside)} changed. {self._how_to_publish_the_rest(live)}"
            return Decision("skipped", self.repo, reason, margin)
        if live is None or record.live != live.model:
            return None
        if record.state == "not_better" and record.comparison and not better(record.comparison, margin):
            reason = f"{tell(record.comparison, margin)} (measured before, on the same inputs)"
            return Decision("not_better", self.repo, reason, margin, self.news, record.comparison)
        if record.state == "published":
            reason = f"the model with these inputs was published before and replaced since: {record.url}"
            return Decision("skipped", self.repo, reason, margin, self.news)
        return None

    def _how_to_publish_the_rest(self, live: PublishedModel) -> str:
        """Return how to publish changed variants and figures of the same model."""
        options = self._options_to_keep_model(live)
        if options is None:
            return f"The published model is not in {self.folder}, so it must be trained again. Try: --force"
        return f"Try: {command('run', 'CONFIG')}{options}"

    def _options_to_keep_model(self, live: PublishedModel) -> str | None:
        """Return options for `tunepress run` to reuse the model in the run's folder; None if it is not published.

        The published model was made of certain commits, which the configuration may not name.
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

    def remember(self, decision: dict) -> Matter:
        """Record the decision of a Job, given as JSON, for the model that it was compared with."""
        figures = Comparison.model_validate(decision["comparison"]) if decision.get("comparison") else None
        if decision["outcome"] == "published" or (decision["outcome"] == "not_better" and figures):
            compared = figures and figures.compared_with
            there = read_published(self.repo, compared.commit) if compared else None
            made = {"state": decision["outcome"], "comparison": figures, "url": decision.get("url")}
            return self.keep(**made, live=there and there.model, job=None)
        return self.keep(job=None)

    def keep(self, **known: Any) -> Matter:
        """Change fields of the record, and write it."""
        record = replace(self.record, **known)
        record.write(self.path)
        return replace(self, record=record)


def _record_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.retraining.json")


def look(config: TrainingRun, root: str | Path) -> Matter:
    """Return the possible retraining, from the repository, the inputs and the record under `root`."""
    repo, inputs = config.publish.target, inputs_of(config)
    live = with_full_model(read_published(repo))
    folder = Path(root) / config.name
    record = Record.read(_record_path(folder))
    if (record.repo, record.inputs) != (repo, inputs.to_dict()):
        record = Record(repo, inputs.to_dict())
    news = changes(live, inputs) if live else ("no model is published yet",)
    return Matter(config, inputs, live, news, record, folder)


def check(config: Config, margin: float) -> TrainingRun:
    """Return the configuration if it can retrain a model.

    Raises:
        ConfigError: if it has no data or no repository, trains its own result, or the margin is out of range.
    """
    if not isinstance(config, TrainingRun) or config.publish.repo is None:
        missing = "data" if config.data is None else "publish.repo"
        raise ConfigError(f"{missing}: not set; retraining trains on data, and publishes what is better")
    if config.model.source.lower() == config.publish.repo.lower():
        raise ConfigError(
            f"model.source {config.model.source}: is publish.repo too, so that each model would be trained from the "
            "last one; publish to another repository"
        )
    if not 0 <= margin <= LARGEST_MARGIN:
        raise ConfigError(f"margin {margin:g}: is not from 0 to {LARGEST_MARGIN:g} standard errors")
    return config


def better(comparison: Comparison, margin: float) -> bool:
    """Return True if the new model's loss is lower by more than `margin` standard errors of the difference."""
    difference = comparison.difference
    assert difference, "two models were compared"
    return difference.value < -comparison.quantile(margin) * difference.stderr


def tell(comparison: Comparison, margin: float) -> str:
    """Return a comparison in one line."""
    gap, prompts = comparison.difference, comparison.prompts
    assert gap and prompts, "two models were compared"
    direction = "lower" if gap.value < 0 else "higher"
    verdict = "better" if better(comparison, margin) else "not better"
    return (
        f"{verdict}: the loss is {direction} by {abs(gap.value):.4f} ± {gap.stderr:.4f} {comparison.unit} on "
        f"the answers to {prompts} prompts, and counts as better if lower by more than "
        f"{comparison.quantile(margin):.2f} standard errors"
    )
