"""What tunepress can make and read, as plain tables. Imports nothing heavy.

A new rounding, format or data form is one file and one row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A kind of quantized model that a repository can carry in a folder of its own."""

    name: str
    format: str
    bits: int
    group_size: int | None  # the default; None for one scale a row
    roundings: tuple[str, ...]  # the first is the default
    packings: tuple[str, ...] = ()  # the orders that codes can be stored in; the first is the default

    @property
    def folder(self) -> str:
        return self.name


VARIANTS = {
    v.name: v
    for v in (
        Variant(
            name="int8",
            format="torchao",
            bits=8,
            group_size=None,
            roundings=("rtn", "hqq"),
        ),
        Variant(
            name="int4",
            format="torchao",
            bits=4,
            group_size=64,
            roundings=("search", "hqq", "rtn"),
            packings=("plain", "tile_packed"),
        ),
    )
}

ALIASES = {
    "int8_weight_only": ("int8",),
    "int4_weight_only": ("int4",),
    "both": ("int8", "int4"),
}

# Columns that may share a scale: what the int4 kernels of torch take on a CPU and on CUDA.
GROUP_SIZES = (32, 64, 128, 256)

DATA_FORMS = {
    "messages": "a list of {role, content} under `messages`",
    "prompt_completion": "two strings under `prompt` and `completion`",
    "instruction": "`instruction` and `output`, and where there is one `input`",
    "question_answer": "two strings under `question` and `answer`",
    "text": "plain text under `text`, all of it learned from",
}


def resolve_variants(name: str) -> tuple[str, ...]:
    """The variants that `name` (a variant or an alias, in any case) stands for.

    Raises:
        KeyError: if there is no such variant.
    """
    key = name.strip().lower()
    if key in VARIANTS:
        return (key,)
    return ALIASES[key]


def variant_names() -> str:
    """Everything `resolve_variants` takes, for messages."""
    return ", ".join([*VARIANTS, *ALIASES])
