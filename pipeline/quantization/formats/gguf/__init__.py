"""GGUF, the file that llama.cpp and Ollama read: one file with the weights, the tokenizer and the chat template.

    Q8_0   w = q * s          8 bits, f16 scale
    Q4_0   w = q * s          4 bits, f16 scale
    Q5_0   w = q * s          5 bits, f16 scale
    Q4_1   w = u * s + m      4 bits, f16 scale and minimum
    Q5_1   w = u * s + m      5 bits, f16 scale and minimum

with signed q, unsigned u, and groups of 32 columns, so that every rounding that knows such a grid
can fill them. Embedding and output head are Q8_0 in all of these. `f16` and `bf16` store weights as
they are. Vectors, such as norms and biases, are always float32. K-quants (`Q4_K_M` and its like) are mixtures
of types that llama.cpp's own quantizer chooses and fills.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import MissingExtra, QuantizationError
from pipeline.quantization.grid import Grid
from pipeline.system.libraries import is_installed

GROUP = 32
_GRIDS = {
    "Q8_0": Grid(8, GROUP, "none", torch.float16),
    "Q4_0": Grid(4, GROUP, "none", torch.float16),
    "Q5_0": Grid(5, GROUP, "none", torch.float16),
    "Q4_1": Grid(4, GROUP, "float", torch.float16, from_zero=True),
    "Q5_1": Grid(5, GROUP, "float", torch.float16, from_zero=True),
}
TABLE = _GRIDS["Q8_0"]  # of embeddings and output heads, where they are quantized


def type_name(spec: VariantSpec) -> str:
    """What GGUF calls the type of a variant's weights: `Q4_0` for gguf-q4_0."""
    return spec.variant.file_type


def type_of(grid: Grid) -> str:
    """What GGUF calls weights on a grid."""
    return next(name for name, known in _GRIDS.items() if known == grid)


def grid(spec: VariantSpec, width: int) -> Grid | None:
    """The grid of a layer with `width` columns; None for variants of 16 bits, and for K-quants, which own theirs.

    Raises:
        QuantizationError: where groups of 32 do not divide the width.
    """
    if spec.variant.group_size is None:
        return None
    if width % GROUP:
        raise QuantizationError(
            f"{spec.name}: groups of {GROUP} do not divide a width of {width}; "
            "name such layers under 'keep' to leave them as they are"
        )
    return _GRIDS[type_name(spec)]


def check(spec: VariantSpec, folder: Path) -> None:
    """Can the model in `folder` be stored so? Its weights are not looked at.

    Raises:
        ModelError: naming what llama.cpp, or this writer, does not know of it.
        MissingExtra: where the package `gguf`, or that of the variant's own quantizer, is not installed.
    """
    from pipeline.quantization.formats.gguf.header import describe

    check_quantizer(spec)

    describe(folder, "model", type_name(spec))


def check_quantizer(spec: VariantSpec) -> None:
    """Raise MissingExtra where the variant has a quantizer of its own, and that is not installed."""
    if spec.variant.quantizer and not is_installed("llama_cpp"):
        raise MissingExtra(spec.name, "llama-cpp")


def check_architecture(kind: str | None) -> None:
    """Raise ModelError if models of this `model_type` cannot be stored so."""
    from pipeline.quantization.formats.gguf.names import architecture

    architecture(kind)
