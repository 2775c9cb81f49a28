"""The typed results of one model: quality, speed, size, settings, and the verdict of its gate.

Keys that a file of an earlier version lacks are None or empty. Keys of later versions are kept and written again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, Strict

from pipeline.config.calibration import CALIBRATED_QUALITY, DISTILLED_QUALITY, FAST_QUALITY
from pipeline.inference.loaders import TIMED

HELD_OUT, GENERAL = "held_out", "general"  # the texts that a model is measured on
TEXTS = {HELD_OUT: "held-out", GENERAL: "general"}


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
Figure = Annotated[
    float,
    Strict(),
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: None if math.isnan(value) else value, when_used="json"),
]
Table = BeforeValidator(_without_nulls)
Part = BeforeValidator(lambda value: {} if value is None else value)
List = BeforeValidator(lambda value: () if value is None else value)
Texts = Annotated[tuple[Text, ...], List]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; an unknown figure is NaN."""

    value: Figure = math.nan
    stderr: Figure = math.nan


class Record(BaseModel):
    """A part of the results; it is immutable and keeps unknown keys."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, Any]:
        """Return the keys that were read or set, as plain data."""
        return self.model_dump(mode="json", exclude_unset=True)


class Quality(Record):
    """The quality on one text.

    Attributes:
        clusters: number of documents, or of different prompts. Only they are independent of each other. None in
            results of earlier versions, whose errors were those of independent sequences.
        freedom: degrees of freedom of the errors. With one cluster there are none, and the errors are NaN.
        digest: digest of the text as tokens; figures with the same digest can be compared.
        loss: mean loss in nats per token.
        rise: relative rise of perplexity over the full-precision model, paired token by token.
        kl: KL divergence from the full-precision model in nats per token.
        agreement: share of tokens at which both models have the same first choice.
    """

    text: Text | None = None
    tokens: Count | None = None
    sequences: Count | None = None
    clusters: Count | None = None
    freedom: Number | None = None
    digest: Text | None = None
    loss: Estimate | None = None
    perplexity: Estimate | None = None
    rise: Estimate | None = None
    kl: Estimate | None = None
    agreement: Estimate | None = None


class Speed(Record):
    """The speed and memory of one loader in a fresh process: seconds, tokens per second, bytes.

    Attributes:
        runs: False if the model loads, but does not run; `reason` says why.
        lacks: packages without which the loader could not be tried; the model then does not run either.
        logits_off_stock: relative difference from the logits of the stock loader.
    """

    loader: Text | None = None
    device: Text | None = None
    load_seconds: Number | None = None
    runs: Flag | None = None
    reason: Text | None = None
    lacks: Texts = ()
    prefill_tokens_per_second: Number | None = None
    decode_tokens_per_second: Number | None = None
    prompt_tokens: Count | None = None
    new_tokens: Count | None = None
    peak_memory_bytes: Count | None = None
    logits_off_stock: Number | None = None


class Answer(Record):
    """A prompt and the answer of a model."""

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
    """The settings of a variant, as `VariantSpec.making` returns them."""

    name: Text | None = None
    group_size: Count | None = None
    rounding: Text | None = None
    embeddings: Text | None = None
    packing: Text | None = None
    keep: Texts = ()
    int8: Texts = ()
    group_sizes: Annotated[dict[str, Texts], Table] = {}


class StoredWeights(Record):
    """The stored layers of a variant: bytes, and the names of layers that are stored differently from the others."""

    weight_bytes: Count | None = None
    source_bytes: Count | None = None
    padding_bytes: Count | None = None
    group_sizes: Annotated[dict[str, Count], Table] = {}
    kept: Texts = ()
    types: Annotated[dict[str, Count], Table] = {}
    eight: Texts = ()
    groups: Annotated[dict[str, Count], Table] = {}
    shapes: Annotated[tuple[tuple[Count, Count], ...], List] = ()
    experts: Count | None = None
    calibration_text: Text | None = None
    calibration_tokens: Count | None = None
    calibration_mixed: Flag | None = None
    calibration_digest: Text | None = None  # of the content of its files, and the commits of its data sets
    distilled_steps: Count | None = None
    distilled_kl_before: Number | None = None
    distilled_kl_after: Number | None = None
    target: Annotated[dict[str, Number], Table] = {}
    expected_kl: Number | None = None

    @property
    def quality(self) -> str:
        """Return the value of `quantize.quality` that it was made with."""
        if self.calibration_tokens is None:
            return FAST_QUALITY
        return CALIBRATED_QUALITY if self.distilled_steps is None else DISTILLED_QUALITY


class Check(Record):
    """One figure and its limit; `value + quantile * stderr` must not exceed `limit`."""

    text: Text | None = None
    figure: Text | None = None
    value: Figure = math.nan
    stderr: Figure = math.nan
    sequences: Count | None = None
    clusters: Count | None = None
    quantile: Figure = math.nan
    limit: Figure = math.nan
    passed: Flag | None = None

    @property
    def is_unsure(self) -> bool:
        """Return True if the value is within the limit, and only its error may exceed it."""
        return self.value <= self.limit

    @property
    def has_error(self) -> bool:
        """Return False if the text is one document, which has no error. Then the limit cannot be checked."""
        return math.isfinite(self.stderr)


class Verdict(Record):
    """The verdict of a gate on a variant, and the fallbacks that were tried.

    Attributes:
        corrected_for: number of tries that the quantiles of the checks allow for.
        withheld: True if the variant was kept out of the release.
    """

    passed: Flag | None = None
    corrected_for: Count | None = None
    limits: Annotated[dict[str, Number], Table] = {}
    checks: Annotated[tuple[Check, ...], List] = ()
    tried: Annotated[tuple[ModelResult, ...], List] = ()
    withheld: Flag | None = None

    @property
    def missed(self) -> list[Check]:
        """The checks that were not passed."""
        return [check for check in self.checks if check.passed is False]


class ModelResult(Record):
    """All results of one model.

    Attributes:
        file: name of its file, for a variant that is one file.
        loader: the loader that measured `quality`.
        offloaded: True if weights stayed on the disk during the measurement.
        quality: by text.
        speed: by loader.
        ratio: its bytes as a share of those of the full-precision model.
    """

    size_bytes: Count | None = None
    parameters: Count | None = None
    file: Text | None = None
    device: Text | None = None
    compute_dtype: Text | None = None
    loader: Text | None = None
    offloaded: Flag | None = None
    quality: Annotated[dict[str, Quality], Table] = {}
    speed: Annotated[dict[str, Speed], Table] = {}
    answers: Annotated[tuple[Answer, ...], List] = ()
    machine: Machine | None = None
    variant: VariantSettings | None = None
    weights: StoredWeights | None = None
    gate: Verdict | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict of the gate; an empty one if there was no gate."""
        return self.gate or Verdict()

    ratio: Number | None = None

    @property
    def fastest(self) -> Speed | None:
        """The speed of the first loader that runs the model."""
        probes = (self.speed.get(loader) for loader in TIMED)
        return next((probe for probe in probes if probe and probe.runs), None)

    def on(self, text: str) -> Quality:
        """Return the quality on a text; an empty one if the model was not measured on it."""
        return self.quality.get(text) or Quality()

    def changed(self, **figures: Any) -> ModelResult:
        """Return the result with these figures replaced."""
        return self.model_copy(update=figures)


class CheckedLoss(Record):
    """What a model loses if one layer alone is quantized: divergence in nats a token, and rise of perplexity."""

    kl: Estimate = Estimate()
    rise: Estimate = Estimate()


class LayerLoss(Record):
    """A layer's share of the KL divergence of a model with all layers quantized, in nats a token; it has no error.

    Attributes:
        checked: the loss if this layer alone is quantized; None if that was not measured.
    """

    name: Text = ""
    weights: Count = 0
    kl: Estimate = Estimate()
    checked: CheckedLoss | None = None


Verdict.model_rebuild()
