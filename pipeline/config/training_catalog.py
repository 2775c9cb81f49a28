"""The catalogue of training: methods (types of the frozen base model) and trainers (kinds of fine-tuning)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.catalog import DATA_FORMS, PREFERENCE

UNCHANGED_BASE, NF4_BASE = "bf16", "nf4"  # types of the base model's linear layers, in training and in merging

ADAPTER = "lora"  # the key of the adapter's section


@dataclass(frozen=True)
class Method:
    """A way to hold the base model in training, and what is trained: an adapter on it, or its own weights.

    Attributes:
        base: the type of its linear layers in memory.
        bits: bits per weight in training.
        merge_bases: the bases to merge the adapter into; training saw the first.
        dropout_bytes: bytes that a GPU keeps for each input of the adapter's dropout.
        said: a phrase for advice on memory.
        title: its name in cards.
        about: its description in cards.
        adapts: True if it trains an adapter; False if it trains the model's own weights, which it holds in float32.
    """

    name: str
    base: str
    bits: int
    merge_bases: tuple[str, ...]
    dropout_bytes: int
    said: str
    title: str
    about: str
    adapts: bool = True

    @property
    def in_nf4(self) -> bool:
        """Return True if the base is held in NF4."""
        return self.base == NF4_BASE


METHODS = {
    m.name: m
    for m in (
        Method(
            "qlora",
            NF4_BASE,
            4,
            (NF4_BASE, UNCHANGED_BASE),
            2,
            "the base in NF4, a quarter of bf16",
            "QLoRA",
            "a LoRA adapter, trained on the base in NF4",
        ),
        Method(
            "lora",
            UNCHANGED_BASE,
            16,
            (UNCHANGED_BASE,),
            4,
            "the base in bf16",
            "LoRA",
            "an adapter, trained on the base in bf16",
        ),
        Method(
            "full",
            UNCHANGED_BASE,
            32,
            (UNCHANGED_BASE,),
            0,
            "all weights in float32",
            "full fine-tuning",
            "all its weights, trained in float32",
            adapts=False,
        ),
    )
}
SMALLEST_METHOD = min(METHODS.values(), key=lambda method: method.bits)


@dataclass(frozen=True)
class Trainer:
    """A kind of fine-tuning.

    Attributes:
        module: the entry of `pipeline.training.trainers` that builds its training loop.
        forms: the data forms that it takes.
        metric: its figure on held-out examples, by its key in the log of the training loop.
        merge_bases: the bases that its adapter can be merged into.
        options: the class that has the fields of `train.options`, as `package.module:Class`.
        sequences: sequences in an example.
        packs: True if it can put several examples into one sequence.
        needs_adapter: True if it needs the model before the training, which an adapter leaves as it was.
        about: its purpose, as a verb with an object.
        title: its name in cards; empty for the default.
        quantizes: True if it can train with quantization (`train.qat`).
        divides: True if several processes can train together.
    """

    name: str
    module: str
    forms: tuple[str, ...]
    metric: str
    merge_bases: tuple[str, ...] = (NF4_BASE, UNCHANGED_BASE)
    options: str = "trl:SFTConfig"
    sequences: int = 1
    packs: bool = True
    needs_adapter: bool = False
    about: str = ""
    title: str = ""
    quantizes: bool = False
    divides: bool = True


_LEARNS_ANSWERS = tuple(form for form in DATA_FORMS if form != PREFERENCE)
_ON_PAIRS: dict[str, Any] = {
    "forms": (PREFERENCE,),
    "metric": "eval_preference_accuracy",
    "sequences": 2,
    "packs": False,
    "needs_adapter": True,
    "quantizes": True,
    "divides": False,
}
TRAINERS = {
    t.name: t
    for t in (
        Trainer(
            "sft",
            "pipeline.training.trainers.sft",
            _LEARNS_ANSWERS,
            "eval_loss",
            about="learns answers",
            quantizes=True,
        ),
        Trainer(
            "dpo",
            "pipeline.training.trainers.dpo",
            options="trl:DPOConfig",
            about="learns which of two answers is better",
            title="DPO",
            **_ON_PAIRS,
        ),
        Trainer(
            "kto",
            "pipeline.training.trainers.kto",
            options="trl:KTOConfig",
            about="learns which answers are good, each for itself",
            title="KTO",
            **_ON_PAIRS,
        ),
    )
}
DEFAULT_TRAINER = next(iter(TRAINERS))


def on_pairs() -> list[Trainer]:
    """Return the trainers that take preference pairs."""
    return [trainer for trainer in TRAINERS.values() if PREFERENCE in trainer.forms]


DEFAULT_ON_PAIRS = on_pairs()[0].name
