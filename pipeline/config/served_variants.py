"""The rows of the catalogue for what servers read. vLLM and SGLang compute packed codes with the Marlin kernels."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.engines import (
    CPU,
    CUDA,
    FP8_CAPABILITY,
    SGLANG,
    TORCHAO_IN_VLLM,
    TRANSFORMERS,
    TUNEPRESS,
    VLLM,
    Runs,
    on,
)
from pipeline.config.registry import NEAREST, Packing, Variant, register

_PACKAGE = {"packages": ("compressed-tensors>=0.15",)}
_IN_TRANSFORMERS = on(TRANSFORMERS, CPU, CUDA, **_PACKAGE)
_PACKED_HERE = (*_IN_TRANSFORMERS, *on(TUNEPRESS, CPU, CUDA))
_AS_STOCK = (*_IN_TRANSFORMERS, *on(TUNEPRESS, CPU, CUDA, **_PACKAGE))  # layers that round their inputs
# vLLM fills up layers whose sizes the kernels do not take, and SGLang does not.
_ON_MARLIN = (*on(VLLM, CUDA, capability=8.0), *on(SGLANG, CUDA, capability=8.0, columns=128, rows=64))
_KERNELS = (*on(TUNEPRESS, CPU, CUDA), *on(VLLM, CPU, columns=32, rows=32, experts=False), *_ON_MARLIN)  # four bits

_FOUR_BITS = Variant(
    name="w4a16",
    format="pack-quantized",
    bits=4,
    group_size=128,
    group_sizes=(32, 64, 128),
    one_group_size=True,
    keeps_embeddings=True,
    roundings=("search", "hqq", NEAREST),
    rise=0.05,
    libraries=("torch", "transformers"),
    requires=(("compressed_tensors", "compressed-tensors"),),
    measured_with=("compressed-tensors",),
    stored_as="stored_as_symmetric.md.jinja",
    experts="experts as well, which transformers turns back into bf16 when it loads them; servers keep the codes",
    runs_on=(*_IN_TRANSFORMERS, *_KERNELS),
)
_EIGHT_BITS = replace(
    _FOUR_BITS,
    name="w8a16",
    bits=8,
    group_size=None,
    roundings=(NEAREST, "hqq", "search"),
    rise=0.02,
    runs_on=(*_PACKED_HERE, *_ON_MARLIN),
)
_INPUTS_TOO = replace(
    _EIGHT_BITS,
    name="w8a8",
    format="naive-quantized",
    roundings=(NEAREST, "hqq"),
    group_sizes=(),
    rounds_inputs=True,
    runs_on=(*_AS_STOCK, *on(VLLM, CPU), *on(VLLM, CUDA, capability=7.5), *on(SGLANG, CUDA, capability=7.5)),
)
_FOR_GPTQMODEL = replace(_FOUR_BITS, requires=(), measured_with=(), usage="runs_gptqmodel.md.jinja")


def register_all() -> None:
    """Register the variants."""
    float8 = {"capability": FP8_CAPABILITY}
    for row in (
        _FOUR_BITS,
        _EIGHT_BITS,
        _INPUTS_TOO,
        replace(_INPUTS_TOO, name="w8a8-static", format="static-quantized", static_inputs=True),
        _float8("fp8", True, *_AS_STOCK, *on(VLLM, CPU), *on(VLLM, CUDA, **float8), *on(SGLANG, CUDA, **float8)),
        _float8("fp8-weight", False, *_PACKED_HERE, *(replace(way, experts=False) for way in _ON_MARLIN)),
        # The formats of two older libraries, which servers compute with the same kernels.
        replace(
            _FOR_GPTQMODEL,
            name="gptq",
            format="gptq",
            runs_on=(*on(TRANSFORMERS, CPU, CUDA, packages=("gptqmodel", "optimum")), *_KERNELS),
        ),
        replace(
            _FOR_GPTQMODEL,
            name="awq",
            format="awq",
            roundings=("search", NEAREST),
            zero="integer",
            runs_on=(*on(TRANSFORMERS, CPU, CUDA, packages=("gptqmodel",)), *_KERNELS),
        ),
    ):
        register(row)


def _float8(name: str, rounds_inputs: bool, *runs_on: Runs) -> Variant:
    """Return a variant of float8, in compressed-tensors or in torchao's own tensors.

    Args:
        runs_on: the ways in which engines run the former.
    """
    capability = FP8_CAPABILITY if rounds_inputs else 0
    torchao = (
        *on(TRANSFORMERS, CPU, packages=("torchao",)),
        *on(TRANSFORMERS, CUDA, packages=("torchao",), capability=capability),
        *on(TUNEPRESS, CPU),
        *on(TUNEPRESS, CUDA, capability=capability),
        *TORCHAO_IN_VLLM,
    )
    snippet = _INPUTS_TOO.snippet
    return replace(
        _INPUTS_TOO,
        name=name,
        values="e4m3",
        roundings=(NEAREST, "search"),
        rounds_inputs=rounds_inputs,
        requires=(),
        packings={
            "compressed-tensors": Packing(_INPUTS_TOO.format, snippet, requires=_INPUTS_TOO.requires, runs_on=runs_on),
            "torchao": Packing("torchao_float8", snippet, said="stored as tensors of torchao", runs_on=torchao),
        },
    )
