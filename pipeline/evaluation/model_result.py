"""What is known of one model, typed: quality, speed, size, settings, and the verdict of its gate.

A key that a file does not have is None or empty here, so that results of earlier versions are read. A key that this
version does not know is kept and written again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict

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
Figure = Annotated[float, Strict(), BeforeValidator(lambda value: math.nan if value is None else value)]
Table = BeforeValidator(_without_nulls)
Part = BeforeValidator(lambda value: {} if value is None else value)
List = BeforeValidator(lambda value: () if value is None else value)
Texts = Annotated[tuple[Text, ...], List]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; NaN is a figure that is not known."""

    value: Figure = math.nan
    stderr: Figure = math.nan


class Record(BaseModel):
    """A part of the results. Values do not change; unknown keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, Any]:
        """Return the keys that were read or set, as plain data."""
        return self.model_dump(mode="json", exclude_unset=True)


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
    group_sizes: Annotated[dict[str, Count], Table] = {}
    kept: Texts = ()
    types: Annotated[dict[str, Count], Table] = {}
    eight: Texts = ()


class Check(Record):
    """One figure held against one limit; `quantile` is the number of standard errors that it must stay below it."""

    text: Text | None = None
    figure: Text | None = None
    value: Figure = math.nan
    stderr: Figure = math.nan
    sequences: Count | None = None
    quantile: Figure = math.nan
    limit: Figure = math.nan
    passed: Flag | None = None

    @property
    def is_unsure(self) -> bool:
        """Return True if the value is within the limit and only its error is not."""
        return self.value <= self.limit


class Verdict(Record):
    """Whether a variant passed its gate, and the ways to make it that were tried."""

    passed: Flag | None = None
    limits: Annotated[dict[str, Number], Table] = {}
    checks: Annotated[tuple[Check, ...], List] = ()
    tried: Annotated[tuple[ModelResult, ...], List] = ()
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
    quality: Annotated[dict[str, Quality], Table] = {}
    speed: Annotated[dict[str, Speed], Table] = {}
    answers: Annotated[tuple[Answer, ...], List] = ()
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


Verdict.model_rebuild()
