"""What tunepress can make and read, as plain tables. Imports nothing heavy.

A new rounding, format or data form is one file and one row here.
"""

from __future__ import annotations

from dataclasses import dataclass

# Columns that may share a scale: what the int4 kernels of torch take on a CPU and on CUDA.
GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Variant:
    """A kind of quantized model that a repository can carry in a folder of its own."""

    name: str
    format: str
    bits: int
    group_size: int | None  # the default; None for one scale a row
    roundings: tuple[str, ...]  # the first is the default
    rise: float  # by how much of itself perplexity may rise, unless another limit is set
    packings: tuple[str, ...] = ()  # the orders that codes can be stored in; the first is the default
    group_sizes: tuple[int, ...] = GROUP_SIZES  # those that can be asked for
    # What becomes of the embedding and the output head, unless asked for otherwise; None: the quantizer chooses.
    embeddings: str | None = "keep"
    quantizer: str | None = None  # a library's own, which takes none of these options

    @property
    def folder(self) -> str:
        return "gguf" if self.format == "gguf" else self.name

    @property
    def gguf_type(self) -> str | None:
        """What llama.cpp calls the type of its weights, such as `Q4_0`; None of variants that are not for it."""
        return self.name.removeprefix("gguf-").upper() if self.format == "gguf" else None


def _gguf(name: str, bits: int, *roundings: str) -> Variant:
    """GGUF has groups of 32 in every type that is filled here, and Q8_0 for embeddings; 16 bits are not rounded."""
    if not roundings:
        return Variant(f"gguf-{name}", "gguf", bits, None, (), 0.01, group_sizes=())
    rise = 0.02 if bits == 8 else 0.05
    return Variant(f"gguf-{name}", "gguf", bits, 32, roundings, rise, group_sizes=(32,), embeddings="int8")


def _k_quants(name: str, bits: int) -> Variant:
    return Variant(f"gguf-{name}", "gguf", bits, None, (), 0.05, group_sizes=(), embeddings=None, quantizer="llama.cpp")


VARIANTS = {
    v.name: v
    for v in (
        Variant(
            name="int8",
            format="torchao",
            bits=8,
            group_size=None,
            roundings=("rtn", "hqq"),
            rise=0.02,
        ),
        Variant(
            name="int8-dynamic",
            format="torchao",
            bits=8,
            group_size=None,
            roundings=("rtn", "hqq"),
            rise=0.02,
            group_sizes=(),
        ),
        Variant(
            name="int4",
            format="torchao",
            bits=4,
            group_size=64,
            roundings=("search", "hqq", "rtn"),
            rise=0.05,
            packings=("plain", "tile_packed"),
        ),
        _gguf("f16", 16),
        _gguf("bf16", 16),
        _gguf("q8_0", 8, "rtn", "hqq", "search"),
        _gguf("q4_0", 4, "search", "hqq", "rtn"),
        _gguf("q4_1", 4, "search", "hqq", "rtn"),
        _gguf("q5_0", 5, "search", "hqq", "rtn"),
        _gguf("q5_1", 5, "search", "hqq", "rtn"),
        _k_quants("q4_k_m", 4),
        _k_quants("q5_k_m", 5),
        _k_quants("q6_k", 6),
    )
}

ALIASES = {
    "int8_weight_only": ("int8",),
    "int4_weight_only": ("int4",),
    "int8_dynamic": ("int8-dynamic",),
    "both": ("int8", "int4"),
    # As people who use llama.cpp write them; bf16 and f16 say too little of what is wanted.
    **{name.removeprefix("gguf-"): (name,) for name, v in VARIANTS.items() if v.format == "gguf" and v.bits < 16},
}

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
