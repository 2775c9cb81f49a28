"""Ready choices of the wizard, as plain tables: what each sets, and that in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class Quantization:
    """Variants by what they are for."""

    about: str
    variants: tuple[dict, ...]


PROFILES = {
    "standard": Profile("the recipe's values, or 4 sequences of 1024 tokens at a time; int8 and int4"),
    "conservative": Profile(
        "8 bits: 2 sequences of 1024 tokens at a time, and int8 alone, which loses least",
        {"train.max_length": 1024, "train.batch_size": 2, "train.accumulate": 8},
        "int8",
    ),
    "aggressive": Profile(
        "4 bits: 1 sequence of 512 tokens at a time, and int4 alone",
        {"train.max_length": 512, "train.batch_size": 1, "train.accumulate": 16},
        "int4",
    ),
    # Models that memory does not hold are measured through accelerate's offload, whatever the profile.
    "extreme": Profile(
        "4 bits, for 32 GB of memory and no large GPU: 1 sequence of 256 tokens, a small adapter, one merged model "
        "at a time, and weights that are read from the disk where memory is short",
        {
            "train.method": "qlora",
            "train.max_length": 256,
            "train.batch_size": 1,
            "train.accumulate": 16,
            "train.lora.rank": 8,
            "train.lora.alpha": 16,
            "merge.base": "bf16",
        },
        "edge",
    ),
}

_INT8 = {"name": "int8"}
QUANTIZATIONS = {
    "balanced": Quantization(
        "int8 and int4 in groups of 64: about half and a third of the size",
        (_INT8, {"name": "int4", "group_size": 64}),
    ),
    "high_quality": Quantization(
        "int8 and int4 in groups of 32: somewhat larger, and loses least",
        (_INT8, {"name": "int4", "group_size": 32}),
    ),
    "edge": Quantization(
        "int4 in groups of 128 and embeddings in 8 bits: the smallest, for CPUs and small devices",
        ({"name": "int4", "group_size": 128, "embeddings": "int8"},),
    ),
    "gpu_optimized": Quantization(
        "int8 and int4 stored in the order of CUDA's tensor cores, in groups of 128",
        (_INT8, {"name": "int4", "group_size": 128, "packing": "tile_packed"}),
    ),
}


# What a recipe says for its own data; where it learns from other data, the defaults hold.
FOR_ITS_DATA = {"demo": ("train.max_steps", "train.max_length", "train.evaluate_every", "evaluate.prompts")}


def told(presets: Mapping[str, Profile | Quantization]) -> list[str]:
    """A line for each."""
    return [f"{name}: {preset.about}" for name, preset in presets.items()]
