"""The catalogue of variants, roundings and data forms, as plain rows of data. It imports nothing heavy.

A variant is one row. Its format is an entry of `pipeline.quantization.formats`, and its roundings are entries of
`pipeline.quantization.roundings`. The wizard, `--help`, planning and cards read the row, so they do not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pipeline.config import served_variants
from pipeline.config.engines import (
    CPU,
    CUDA,
    GGUF_ENGINES,
    SGLANG,
    TORCHAO,
    TORCHAO_IN_VLLM,
    TUNEPRESS,
    VLLM,
    on,
)
from pipeline.config.engines import LLAMA_CPP as LLAMA_CPP
from pipeline.config.engines import TRANSFORMERS as TRANSFORMERS
from pipeline.config.registry import GROUP_SIZES as GROUP_SIZES
from pipeline.config.registry import KEEP as KEEP
from pipeline.config.registry import NEAREST as NEAREST
from pipeline.config.registry import ROUNDINGS as ROUNDINGS
from pipeline.config.registry import VARIANTS as VARIANTS
from pipeline.config.registry import Need as Need
from pipeline.config.registry import Packing as Packing
from pipeline.config.registry import Rounding as Rounding
from pipeline.config.registry import Variant as Variant
from pipeline.config.registry import register as register
from pipeline.config.registry import remove as remove

EIGHT_BITS = "int8"  # the value of `embeddings`, and the key for single layers, for eight bits with a scale per row
GGUF = "gguf"  # the format of llama.cpp, and the folder of its files

_BLOCKS = "numbers of four bits, one scale for each 64"
_ROUNDINGS = "pipeline.quantization.roundings"
register(Rounding(NEAREST, f"{_ROUNDINGS}.rtn", ("none", "integer", "float"), "rounded to nearest"))
register(Rounding("hqq", f"{_ROUNDINGS}.hqq", ("none", "float"), "rounded by HQQ without data"))
register(
    Rounding(
        "search",
        f"{_ROUNDINGS}.search",
        ("none", "integer", "float"),
        "scales fitted by least squares",
        uses=Need.SECOND_MOMENTS,
    )
)


def _gguf(name: str, bits: int, *roundings: str, zero: str = "none", group: int = 32) -> Variant:
    """Return a GGUF variant: with groups and embeddings in Q8_0 if it has roundings."""
    groups = {"group_size": group, "group_sizes": (group,), "embeddings": EIGHT_BITS}
    return Variant(
        name=f"gguf-{name}",
        format=GGUF,
        bits=bits,
        roundings=roundings,
        rise={16: 0.01, 8: 0.02}.get(bits, 0.05),
        zero=zero,
        libraries=("torch", "gguf", "transformers"),
        requires=(("gguf", "gguf"),),
        engine=LLAMA_CPP,
        measured_with=("llama-cpp-python",),
        suffix=".gguf",
        file_type=name.upper(),
        shared_folder=GGUF,
        runs_on=GGUF_ENGINES,
        **(groups if roundings else {"group_size": None, "group_sizes": ()}),
    )


def _bitsandbytes(name: str, bits: int, kind: str, said: str, capability: float = 6.0) -> Variant:
    """Return a variant that bitsandbytes rounds and runs.

    Args:
        kind: its name for the values of codes.
        said: how it stores linear layers.
        capability: the lowest CUDA compute capability of its kernels.
    """
    with_it = {"packages": ("bitsandbytes",)}
    rows = 1 if bits == 8 else 32  # of a layer, on CPUs with AVX512-BF16
    return Variant(
        name=f"bnb-{name}",
        format="bitsandbytes",
        bits=bits,
        group_size=None,
        group_sizes=(),
        roundings=(),
        keeps_embeddings=True,
        rise={8: 0.02}.get(bits, 0.05),
        rounds_inputs=bits == 8,
        libraries=("torch", "bitsandbytes", "transformers"),
        measured_with=("bitsandbytes",),
        values=kind,
        said=f"linear layers are {said}; bitsandbytes makes and runs them",
        runs_on=(
            *on(TRANSFORMERS, CPU, rows=rows, **with_it),
            *on(TRANSFORMERS, CUDA, capability=capability, **with_it),
            *on(TUNEPRESS, CPU),
            *on(TUNEPRESS, CUDA, capability=capability),
            *on(VLLM, CUDA, capability=max(capability, 7.0), **with_it),
            *on(SGLANG, CUDA, capability=max(capability, 7.0), experimental=True, **with_it),
        ),
    )


def _by_llama_cpp(plain: Variant) -> Variant:
    """Return a GGUF variant that llama.cpp quantizes with its own settings, unless a rounding is named."""
    return replace(
        plain,
        embeddings=plain.embeddings if plain.roundings else None,
        quantizer=LLAMA_CPP,
        libraries=(*plain.libraries, *plain.measured_with),
        quantizer_requires=(("llama_cpp", "llama-cpp"),),
    )


register(
    Variant(
        name="int8",
        format="torchao",
        bits=8,
        group_size=None,
        roundings=(NEAREST, "hqq"),
        rise=0.02,
        stored_as="stored_as_symmetric.md.jinja",
        experts="experts as well, in stacks of which transformers computes one expert at a time",
        runs_on=(*TORCHAO, *TORCHAO_IN_VLLM),
    )
)
register(
    replace(
        VARIANTS[EIGHT_BITS],
        name="int8-dynamic",
        group_sizes=(),
        rounds_inputs=True,
    )
)
register(
    Variant(
        name="int4",
        format="torchao",
        bits=4,
        group_size=64,
        roundings=("search", "hqq", NEAREST),
        rise=0.05,
        zero="float",
        packings={
            "plain": Packing(
                "torchao",
                "snippet_int4.py.jinja",
                "runs_int4.md.jinja",
                mixes=True,
                runs_on=(
                    *on(TRANSFORMERS, CPU, packages=("torchao",), computes=False),
                    *on(TRANSFORMERS, CUDA, packages=("torchao", "mslk")),
                    *on(TUNEPRESS, CPU, CUDA),
                    *TORCHAO_IN_VLLM,
                ),
            ),
            "tile_packed": Packing(
                "tile_packed",
                "snippet_int4_tiles.py.jinja",
                "runs_int4_tiles.md.jinja",
                "stored in the tiles that the tensor cores of CUDA cards read",
                runs_on=(
                    *on(TRANSFORMERS, CPU, packages=("torchao",), computes=False),
                    *on(TRANSFORMERS, CUDA, packages=("torchao",), capability=8.0, experimental=True),
                    *on(TUNEPRESS, CPU),
                    *on(TUNEPRESS, CUDA, capability=8.0, experimental=True),
                ),
            ),
        },
        stored_as="stored_as_int4.md.jinja",
    )
)
register(_bitsandbytes("int8", 8, "llm_int8", "eight-bit integers, one scale for each row", capability=7.5))
register(_bitsandbytes("nf4", 4, "nf4", f"NF4 {_BLOCKS}, whose scales have eight bits (double quantization)"))
register(_bitsandbytes("fp4", 4, "fp4", f"FP4 {_BLOCKS}"))

served_variants.register_all()
register(_gguf("f16", 16))
register(_gguf("bf16", 16))
register(_gguf("q8_0", 8, NEAREST, "hqq", "search"))
register(_gguf("q4_0", 4, "search", "hqq", NEAREST))
register(_gguf("q4_1", 4, "search", "hqq", NEAREST, zero="float"))
register(_gguf("q5_0", 5, "search", "hqq", NEAREST))
register(_gguf("q5_1", 5, "search", "hqq", NEAREST, zero="float"))
register(_gguf("q4_k", 4, "search", NEAREST, zero="float"))
register(_gguf("q5_k", 5, "search", NEAREST, zero="float"))
register(_by_llama_cpp(_gguf("q4_k_m", 4)))
register(_by_llama_cpp(_gguf("q5_k_m", 5)))
register(_by_llama_cpp(_gguf("q6_k", 6, "search", NEAREST, group=16)))
# A further rounding is registered here, after the variants that offer it.
register(
    Rounding(
        "gptq",
        f"{_ROUNDINGS}.gptq",
        ("none", "integer", "float"),
        "rounded by GPTQ, so that later columns make up for the errors of earlier ones",
        needs=Need.GRAM_MATRIX,
        uses=Need.GRAM_MATRIX,
        gain=0.75,
    )
)
CALIBRATED = "gptq"  # the default rounding if there is calibration text, and the quality asks for it

DEFAULT_VARIANTS = ("int8", "int4")

ALIASES = {
    "int8_weight_only": ("int8",),
    "int4_weight_only": ("int4",),
    "int8_dynamic": ("int8-dynamic",),
    "both": DEFAULT_VARIANTS,
    "nf4": ("bnb-nf4",),
    "fp4": ("bnb-fp4",),
    # The names of llama.cpp, except bf16 and f16, which do not imply GGUF.
    **{v.file_type.lower(): (v.name,) for v in VARIANTS.values() if v.file_type and v.bits < 16},
}

PREFERENCE = "preference"  # the data form of trainers that compare two answers
DATA_FORMS = {
    "messages": "a list of {role, content} under `messages`",
    "prompt_completion": "two strings under `prompt` and `completion`",
    "instruction": "`instruction` and `output`, and where there is one `input`",
    "question_answer": "two strings under `question` and `answer`",
    "text": "plain text under `text`, all of it learned from",
    PREFERENCE: "two answers to one question, the better one under `chosen` and the other under `rejected`",
}


def resolve_variants(name: str) -> tuple[str, ...]:
    """Return the variants of a name: of a variant or an alias, in any case.

    Raises:
        KeyError: if there is no such variant.
    """
    key = name.strip().lower()
    if key in VARIANTS:
        return (key,)
    return ALIASES[key]


def resolve_listed(listed: Iterable[str]) -> list[str]:
    """Return the variants of lists of names, each separated by commas, in their order; one may occur twice.

    Raises:
        KeyError: with the first name that is no variant.
    """
    names: list[str] = []
    for given in (name.strip() for text in listed for name in text.split(",") if name.strip()):
        try:
            names += resolve_variants(given)
        except KeyError:
            raise KeyError(given) from None
    return names


def variant_names() -> str:
    """Return all names that `resolve_variants` takes, for messages."""
    return ", ".join([*VARIANTS, *ALIASES])


def is_one_file(model: str) -> bool:
    """Return True if `model`, a model of a release, is a variant in one file."""
    return model in VARIANTS and VARIANTS[model].is_one_file


def fitting_group_size(width: int, wanted: int) -> int | None:
    """Return the largest allowed group size that divides `width` and is at most `wanted`; None if none does."""
    return next((size for size in sorted(GROUP_SIZES, reverse=True) if size <= wanted and width % size == 0), None)
