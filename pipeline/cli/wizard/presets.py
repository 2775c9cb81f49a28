"""Ready choices of the wizard, as plain tables: what each sets, and that in one line."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.catalog import DEFAULT_VARIANTS
from pipeline.config.training_catalog import SMALLEST_METHOD, UNCHANGED_BASE


@dataclass(frozen=True)
class Profile:
    """How large a step of training is, and which quantized models that goes with.

    Attributes:
        about: one line for people.
        settings: dotted keys of the configuration and their values.
        quantization: the default answer to what is quantized.
    """

    about: str
    settings: dict[str, object] = field(default_factory=dict)
    quantization: str = "balanced"


EIGHT, FOUR = DEFAULT_VARIANTS
PROFILES = {
    "standard": Profile("the recipe's values, or 4 sequences of 1024 tokens at a time; int8 and int4"),
    "conservative": Profile(
        "8 bits: 2 sequences of 1024 tokens at a time, and int8 alone, which loses least",
        {"train.max_length": 1024, "train.batch_size": 2, "train.accumulate": 8},
        EIGHT,
    ),
    "aggressive": Profile(
        "4 bits: 1 sequence of 512 tokens at a time, and int4 alone",
        {"train.max_length": 512, "train.batch_size": 1, "train.accumulate": 16},
        FOUR,
    ),
    # Models that memory does not hold are measured through accelerate's offload, whatever the profile.
    "extreme": Profile(
        "4 bits, for 32 GB of memory and no large GPU: 1 sequence of 256 tokens, a small adapter, one merged model "
        "at a time, and weights that are read from the disk where memory is short",
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

# What a recipe says for its own data; where it learns from other data, the defaults hold.
FOR_ITS_DATA = {"demo": ("train.max_steps", "train.max_length", "train.evaluate_every", "evaluate.prompts")}
