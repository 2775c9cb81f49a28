"""Presets of the wizard as tables: the settings of each, and a line that describes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.catalog import DEFAULT_VARIANTS
from pipeline.config.training_catalog import SMALLEST_METHOD, UNCHANGED_BASE


@dataclass(frozen=True)
class Profile:
    """The size of a training step, and the variants that go with it.

    Attributes:
        about: one line that the wizard shows.
        settings: dotted keys of the configuration and their values.
        quantization: the default answer to the question about variants.
    """

    about: str
    settings: dict[str, object] = field(default_factory=dict)
    quantization: str = "balanced"


EIGHT, FOUR = DEFAULT_VARIANTS
PROFILES = {
    "standard": Profile("the recipe's values, or 4 sequences of 1024 tokens at a time; int8 and int4"),
    "conservative": Profile(
        "8 bits: 2 sequences of 1024 tokens at a time; int8 only, the most accurate variant",
        {"train.max_length": 1024, "train.batch_size": 2, "train.accumulate": 8},
        EIGHT,
    ),
    "aggressive": Profile(
        "4 bits: 1 sequence of 512 tokens at a time; int4 only",
        {"train.max_length": 512, "train.batch_size": 1, "train.accumulate": 16},
        FOUR,
    ),
    # With every profile, a model larger than memory is measured through accelerate's offload.
    "extreme": Profile(
        "for 32 GB of memory and no large GPU: 1 sequence of 256 tokens, a small adapter, 4 bits; "
        "weights are read from the disk if memory is short",
        {
            "train.method": SMALLEST_METHOD.name,
            "train.max_length": 256,
            "train.batch_size": 1,
            "train.accumulate": 16,
            "train.lora.rank": 8,
            "train.lora.alpha": 16,
            "merge.base": UNCHANGED_BASE,
        },
        "edge",
    ),
}

# Settings of a recipe that suit only its own data. With other data, the defaults apply.
FOR_ITS_DATA = {"demo": ("train.max_steps", "train.max_length", "train.evaluate_every", "evaluate.prompts")}
