"""The typed results of a run: the content of `results.json`, and of the results in a lineage.

Only this module, `data_result` and `model_result` know the keys of the files. Files of earlier and later versions can
be read: missing keys are None or empty, and unknown keys are kept. So `to_json` returns exactly what was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pipeline.config.catalog import VARIANTS
from pipeline.errors import HubError, WorkspaceError
from pipeline.evaluation.cluster_errors import quantile
from pipeline.evaluation.data_result import Data
from pipeline.evaluation.model_result import (
    Count,
    Estimate,
    Flag,
    List,
    ModelResult,
    Number,
    Part,
    Record,
    Table,
    Text,
    Texts,
)
from pipeline.system.files import read_json

BASE, MERGED = "base", "merged"  # the models of a run beside its variants
_FIRST = ("origin", "data", "training", "adapter", "merge", BASE, MERGED)  # in `results.json`; others by name


class Origin(Record):
    """The origin of a model or an adapter."""

    source: Text | None = None
    name: Text | None = None
    revision: Text | None = None
    license: Text | None = None
    license_name: Text | None = None
    license_link: Text | None = None
    languages: Texts = ()
    hub_id: Text | None = None
    changes: Text | None = None
    digest: Text | None = None


class Preference(Record):
    """The training on preference pairs, alone or after another training, and its figures on held-out pairs.

    Attributes:
        trainer: kind of the training, as `train.trainer` names it.
        accuracy: share of pairs whose better answer has the higher reward.
        margin: the reward of the better answer minus that of the worse one, in nats times beta.
        likelier: share of pairs whose better answer has the higher log-probability per token.
        likelier_gain: its change by this training.
    """

    trainer: Text | None = None
    steps: Count | None = None
    train_loss: Number | None = None
    held_out_loss: Number | None = None
    accuracy: Estimate | None = None
    margin: Estimate | None = None
    likelier: Estimate | None = None
    likelier_gain: Estimate | None = None


class Training(Record):
    """The training of the adapter."""

    steps: Count | None = None
    train_loss: Number | None = None
    held_out_loss: Number | None = None
    trainable_parameters: Count | None = None
    seconds_training: Number | None = None
    compute_dtype: Text | None = None
    packing: Flag | None = None
    resumed_from_step: Count | None = None
    device: Text | None = None
    processes: Count | None = None
    best_step: Count | None = None
    preference: Preference | None = None
    history: Annotated[tuple[dict[str, Any], ...], List] = ()


class MergeLoss(Record):
    """The loss of the adapter on its base, or of one way to merge it."""

    loss: Estimate | None = None
    tokens: Count | None = None
    loss_above_live: Estimate | None = None
    kl: Estimate | None = None


class MergeComparison(Record):
    """The adapter as it was trained beside the two ways to merge it, on held-out text.

    Attributes:
        freedom: degrees of freedom of the errors.
    """

    live: MergeLoss | None = None
    nf4: MergeLoss | None = None
    bf16: MergeLoss | None = None
    nf4_minus_bf16: Estimate | None = None
    freedom: Number | None = None


class Merge(Record):
    """The base that the adapter was merged into."""

    base: Text | None = None
    asked: Text | None = None
    compared: Annotated[MergeComparison, Part] = MergeComparison()


class ComparedWith(Record):
    """The published release that a retrained model was compared with."""

    repo: Text | None = None
    commit: Text | None = None


class Comparison(Record):
    """The comparison of a retrained model with the published one; only `inputs` and `weights` are set without one.

    Attributes:
        inputs: the inputs of the new model.
        weights: digest of the weights of the new model.
        unit: unit of the losses `new`, `live` and `difference`.
        freedom: degrees of freedom of the errors; None in results of earlier versions.
    """

    inputs: dict[str, Any] = {}
    weights: Text | None = None
    compared_with: ComparedWith | None = None
    unit: Text | None = None
    paired_by: Text | None = None
    new: Estimate | None = None
    live: Estimate | None = None
    difference: Estimate | None = None
    tokens: Count | None = None
    examples: Count | None = None
    prompts: Count | None = None
    freedom: Number | None = None
    note: Text | None = None
    device: Text | None = None

    def quantile(self, margin: float) -> float:
        """Return the number of standard errors of the difference that is as rare as `margin` known ones."""
        assert self.prompts, "two models were compared"
        return quantile(margin, self.prompts - 1 if self.freedom is None else self.freedom)


class TextPlan(Record):
    """How many tokens of each text are measured, chosen to fit a time limit."""

    max_tokens: Count | None = None


class Results(Record):
    """Every figure of a run.

    Attributes:
        base: the base model.
        merged: the merged model.
        variants: by name; in the file their keys are beside `base` and `merged`.
        withheld: measured variants that are not in the release.
    """

    origin: Annotated[Origin, Part] = Origin()
    data: Data | None = None
    training: Training | None = None
    adapter: Origin | None = None
    merge: Merge | None = None
    base: ModelResult | None = None
    merged: ModelResult | None = None
    retraining: Comparison | None = None
    texts: TextPlan | None = None
    withheld: Annotated[dict[str, ModelResult], Table] = {}
    variants: Annotated[dict[str, ModelResult], Table] = Field(default={}, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _gather_variants(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        rest = {key: value for key, value in told.items() if key not in VARIANTS}
        return rest | {"variants": {key: value for key, value in told.items() if key in VARIANTS}}

    @classmethod
    def read(cls, path: Path) -> Results:
        """Return the results in a file, or empty ones if there is no file.

        Raises:
            WorkspaceError: if the file is damaged.
        """
        try:
            return cls.model_validate(read_json(path, {}))
        except ValidationError as error:
            raise WorkspaceError(f"{path}: {first_problem(error)}") from None

    @classmethod
    def of_lineage(cls, told: Mapping[str, Any], repo: str) -> Results:
        """Return the results in the lineage of a repository.

        Raises:
            HubError: if they are damaged.
        """
        try:
            return cls.model_validate(told.get("results") or {})
        except ValidationError as error:
            raise HubError(f"{repo}: its tunepress.json cannot be read (results.{first_problem(error)})") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        found = super().to_json() | {name: result.to_json() for name, result in self.variants.items()}
        withheld = {"withheld": found.pop("withheld")} if "withheld" in found else {}
        first = {name: found.pop(name) for name in _FIRST if name in found}
        return first | dict(sorted(found.items())) | withheld

    def __getitem__(self, model: str) -> ModelResult:
        """Return the results of a model, or empty ones if it was not measured."""
        return self.models.get(model) or ModelResult()

    @property
    def models(self) -> dict[str, ModelResult]:
        """The measured models by name."""
        own = {BASE: self.base, MERGED: self.merged}
        return {name: result for name, result in own.items() if result} | self.variants

    def released(self, variants: Iterable[str], withheld: Iterable[str] = ()) -> Results:
        """Return the results of a release with exactly these variants."""
        update: dict[str, Any] = {"variants": {v: self.variants[v] for v in variants if v in self.variants}}
        if kept_out := {v: self.variants[v] for v in withheld}:
            update["withheld"] = kept_out
        return self.model_copy(update=update)

    def without_answers(self) -> Results:
        """Return the results without the answers of models."""
        silent = {name: result.changed(answers=()) for name, result in self.models.items()}
        own = {name: silent.pop(name) for name in (BASE, MERGED) if name in silent}
        return self.model_copy(update=own | {"variants": silent})


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a file in one line."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
