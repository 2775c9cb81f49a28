"""Figures of a run, typed: the content of `results.json` and of the results in a lineage.

This module is the only one that knows the keys of the files. It also reads what earlier versions wrote: a key that
a file does not have is None or empty here, and a key that this version does not know is kept and written again.
`to_json` therefore returns what was read, without a change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator

from pipeline.config.catalog import VARIANTS
from pipeline.errors import HubError, WorkspaceError
from pipeline.inference.loaders import TIMED
from pipeline.system.files import read_json

BASE, MERGED = "base", "merged"  # the models of a run beside its variants
HELD_OUT, GENERAL = "held_out", "general"  # the texts that a model is measured on
TEXTS = {HELD_OUT: "held-out", GENERAL: "general"}
_FIRST = ("origin", "data", "training", "adapter", "merge", BASE, MERGED)  # in `results.json`; others by name


def _whole_characters(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _without_nulls(value: Any) -> Any:
    if value is None:
        return {}
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


Text = Annotated[str, BeforeValidator(_whole_characters)]
Count = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
_Figure = Annotated[float, Strict(), BeforeValidator(lambda value: math.nan if value is None else value)]
_Table = BeforeValidator(_without_nulls)
_Part = BeforeValidator(lambda value: {} if value is None else value)
_List = BeforeValidator(lambda value: () if value is None else value)
Texts = Annotated[tuple[Text, ...], _List]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; NaN is a figure that is not known."""

    value: _Figure = math.nan
    stderr: _Figure = math.nan


class Record(BaseModel):
    """A part of the results. Values do not change; unknown keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, Any]:
        """Return the keys that were read or set, as plain data."""
        return self.model_dump(mode="json", exclude_unset=True)


class Origin(Record):
    """Where a model or an adapter came from, as it was recorded when it was read."""

    source: Text | None = None
    name: Text | None = None
    revision: Text | None = None
    license: Text | None = None
    languages: Texts = ()
    hub_id: Text | None = None
    changes: Text | None = None
    digest: Text | None = None


class Overlap(Record):
    """How many held-out examples the training data know."""

    compared: Count | None = None
    same: Count | None = None
    near: Count | None = None
    run_of_words: Count | None = None
    near_from: Number | None = None


class Lengths(Record):
    """Lengths of sequences, in tokens."""

    min: Count | None = None
    median: Count | None = None
    p95: Count | None = None
    max: Count | None = None


class Split(Record):
    """Counts of the examples that were trained on, or held out."""

    examples: Count | None = None
    sequences: Count | None = None
    tokens: Count | None = None
    loss_tokens: Count | None = None
    truncated: Count | None = None
    dropped: Count | None = None
    cut: Count | None = None
    lengths: Annotated[Lengths, _Part] = Lengths()


class Data(Record):
    """The data set that was trained on."""

    source: Text | None = None
    subset: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    form: Text | None = None
    rows: Count | None = None
    duplicates: Count | None = None
    skipped: Count | None = None
    unused_columns: Texts = ()
    fingerprint: Text | None = None
    trained_from: Text | None = None
    license: Text | None = None
    language: Text | None = None
    template: Text | None = None
    overlap: Annotated[Overlap, _Part] = Overlap()
    splits: Annotated[dict[str, Split], _Table] = {}


class Training(Record):
    """How the adapter was trained."""

    steps: Count | None = None
    train_loss: Number | None = None
    held_out_loss: Number | None = None
    trainable_parameters: Count | None = None
    seconds_training: Number | None = None
    compute_dtype: Text | None = None
    resumed_from_step: Count | None = None
    device: Text | None = None
    processes: Count | None = None
    history: Annotated[tuple[dict[str, Any], ...], _List] = ()


class MergeLoss(Record):
    """The loss of the adapter on its base, or of one way to merge it."""

    loss: Estimate | None = None
    tokens: Count | None = None
    loss_above_live: Estimate | None = None
    kl: Estimate | None = None


class MergeComparison(Record):
    """The adapter as it was trained beside the two ways to merge it, on held-out text."""

    live: MergeLoss | None = None
    nf4: MergeLoss | None = None
    bf16: MergeLoss | None = None
    nf4_minus_bf16: Estimate | None = None


class Merge(Record):
    """The base that the adapter was merged into."""

    base: Text | None = None
    asked: Text | None = None
    compared: Annotated[MergeComparison, _Part] = MergeComparison()


class Quality(Record):
    """What was measured on one text.

    Attributes:
        digest: of the text as tokens; figures of the same digest can be compared.
        loss: nats a token.
        rise: of perplexity over the full-precision model's, as a share of it; paired token by token.
        kl: divergence from the full-precision model, nats a token.
        agreement: share of tokens at which both models have the same first choice.
    """

    text: Text | None = None
    tokens: Count | None = None
    sequences: Count | None = None
    digest: Text | None = None
    loss: Estimate | None = None
    perplexity: Estimate | None = None
    rise: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None


class Speed(Record):
    """What a fresh process found that loads a model with one loader: seconds, tokens a second, bytes.

    Attributes:
        runs: False of a model that loads, but cannot be computed with; `reason` says why.
        logits_off_stock: relative difference from the stock loader's logits.
    """

    loader: Text | None = None
    device: Text | None = None
    load_seconds: Number | None = None
    runs: Flag | None = None
    reason: Text | None = None
    prefill_tokens_per_second: Number | None = None
    decode_tokens_per_second: Number | None = None
    prompt_tokens: Count | None = None
    new_tokens: Count | None = None
    peak_memory_bytes: Count | None = None
    logits_off_stock: Number | None = None


class Answer(Record):
    """A prompt and what a model made of it."""

    prompt: Text | None = None
    answer: Text | None = None


class Machine(Record):
    """The machine that measured."""

    cpu: Text | None = None
    cores: Count | None = None
    memory_bytes: Count | None = None
    gpu: Text | None = None
    system: Text | None = None
    cpu_capability: Text | None = None


class VariantSettings(Record):
    """How a variant was made, as `VariantSpec.making` tells it."""

    name: Text | None = None
    group_size: Count | None = None
    rounding: Text | None = None
    embeddings: Text | None = None
    packing: Text | None = None
    keep: Texts = ()
    int8: Texts = ()


class StoredWeights(Record):
    """What became of a variant's layers: bytes, and names of those that are not stored as the others are."""

    weight_bytes: Count | None = None
    source_bytes: Count | None = None
    padding_bytes: Count | None = None
    group_sizes: Annotated[dict[str, Count], _Table] = {}
    kept: Texts = ()
    types: Annotated[dict[str, Count], _Table] = {}
    eight: Texts = ()


class Check(Record):
    """One figure held against one limit; `quantile` is the number of standard errors that it must stay below it."""

    text: Text | None = None
    figure: Text | None = None
    value: _Figure = math.nan
    stderr: _Figure = math.nan
    sequences: Count | None = None
    quantile: _Figure = math.nan
    limit: _Figure = math.nan
    passed: Flag | None = None

    @property
    def is_unsure(self) -> bool:
        """Return True if the value is within the limit and only its error is not."""
        return self.value <= self.limit


class Verdict(Record):
    """Whether a variant passed its gate, and the ways to make it that were tried."""

    passed: Flag | None = None
    limits: Annotated[dict[str, Number], _Table] = {}
    checks: Annotated[tuple[Check, ...], _List] = ()
    tried: Annotated[tuple[ModelResult, ...], _List] = ()
    withheld: Flag | None = None

    @property
    def missed(self) -> list[Check]:
        """The checks that were not passed."""
        return [check for check in self.checks if check.passed is False]


class ModelResult(Record):
    """Everything that is known of one model: what it is, what it costs, and how good it is.

    Attributes:
        file: name of its GGUF file, if it is one.
        loader: what `quality` was measured with.
        offloaded: True if its weights stayed in their files meanwhile.
        quality: by text.
        speed: by loader.
        ratio: its bytes as a share of the full-precision model's.
    """

    size_bytes: Count | None = None
    parameters: Count | None = None
    file: Text | None = None
    device: Text | None = None
    compute_dtype: Text | None = None
    loader: Text | None = None
    offloaded: Flag | None = None
    quality: Annotated[dict[str, Quality], _Table] = {}
    speed: Annotated[dict[str, Speed], _Table] = {}
    answers: Annotated[tuple[Answer, ...], _List] = ()
    machine: Machine | None = None
    variant: VariantSettings | None = None
    weights: StoredWeights | None = None
    gate: Verdict | None = None
    ratio: Number | None = None

    @property
    def fastest(self) -> Speed | None:
        """The speed that stands for the model: that of the first loader that runs it."""
        probes = (self.speed.get(loader) for loader in TIMED)
        return next((probe for probe in probes if probe and probe.runs), None)

    def on(self, text: str) -> Quality:
        """Return what was measured on a text; nothing in it is known if it was not."""
        return self.quality.get(text) or Quality()

    def changed(self, **figures: Any) -> ModelResult:
        """Return the same result with other or more figures."""
        return self.model_copy(update=figures)


class LayerLoss(Record):
    """What a model loses if one layer alone is quantized: divergence in nats a token, and rise of perplexity."""

    name: Text | None = None
    weights: Count | None = None
    kl: Estimate | None = None
    rise: Estimate | None = None


class ComparedWith(Record):
    """The release that a retrained model was compared with."""

    repo: Text | None = None
    commit: Text | None = None


class Comparison(Record):
    """A retrained model beside the published one; only `inputs` and `weights` are known if there was none.

    Attributes:
        inputs: what the new model was made of.
        weights: digest of the new model's weights.
        unit: of `new`, `live` and `difference`, which are losses.
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
    note: Text | None = None
    device: Text | None = None


class TextPlan(Record):
    """How many tokens of each text are measured, chosen to fit a time limit."""

    max_tokens: Count | None = None


class Results(Record):
    """Every figure of a run.

    Attributes:
        base: the model that all began with.
        merged: the model with the adapter in its weights.
        variants: by name; in the file they stand beside `base` and `merged`.
        withheld: variants that were measured and kept out of the release.
    """

    origin: Annotated[Origin, _Part] = Origin()
    data: Data | None = None
    training: Training | None = None
    adapter: Origin | None = None
    merge: Merge | None = None
    base: ModelResult | None = None
    merged: ModelResult | None = None
    retraining: Comparison | None = None
    texts: TextPlan | None = None
    withheld: Annotated[dict[str, ModelResult], _Table] = {}
    variants: Annotated[dict[str, ModelResult], _Table] = Field(default={}, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _gather_variants(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        rest = {key: value for key, value in told.items() if key not in VARIANTS}
        return rest | {"variants": {key: value for key, value in told.items() if key in VARIANTS}}

    @classmethod
    def read(cls, path: Path) -> Results:
        """Return the results in a file; empty ones if there is no file.

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
        """Return what is known of a model; nothing is if it was not measured."""
        return self.models.get(model) or ModelResult()

    @property
    def models(self) -> dict[str, ModelResult]:
        """The models that there are figures of, by name."""
        own = {BASE: self.base, MERGED: self.merged}
        return {name: result for name, result in own.items() if result} | self.variants

    def released(self, variants: Iterable[str], withheld: Iterable[str] = ()) -> Results:
        """Return the results of a release with exactly these variants; others stay out of its card."""
        update: dict[str, Any] = {"variants": {v: self.variants[v] for v in variants if v in self.variants}}
        if kept_out := {v: self.variants[v] for v in withheld}:
            update["withheld"] = kept_out
        return self.model_copy(update=update)

    def without_answers(self) -> Results:
        """Return the same results without what models answered."""
        silent = {name: result.changed(answers=()) for name, result in self.models.items()}
        own = {name: silent.pop(name) for name in (BASE, MERGED) if name in silent}
        return self.model_copy(update=own | {"variants": silent})


def first_problem(error: ValidationError) -> str:
    """Return in one line what makes a file unreadable."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


Verdict.model_rebuild()
