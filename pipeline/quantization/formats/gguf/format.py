"""GGUF, the file that llama.cpp and Ollama read: one file with the weights, the tokenizer and the chat template.

    Q8_0   w = q * s          8 bits, f16 scale
    Q4_0   w = q * s          4 bits, f16 scale
    Q5_0   w = q * s          5 bits, f16 scale
    Q4_1   w = u * s + m      4 bits, f16 scale and minimum
    Q5_1   w = u * s + m      5 bits, f16 scale and minimum
    Q4_K   w = u * s + m      4 bits, scale and minimum of 6 bits, each times an f16 number of 8 groups
    Q5_K   w = u * s + m      5 bits, likewise
    Q6_K   w = q * s          6 bits, scale of 8 bits times an f16 number of 16 groups

with signed q, unsigned u, and groups of 32 columns (Q6_K: 16), so that every rounding that knows such a grid can fill
them. A matrix whose width super-blocks of 256 columns do not divide is stored in another type, as llama.cpp does it.
Embedding and output head are Q8_0 in all of these. `f16` and `bf16` store weights as they are. Vectors, such as norms
and biases, are always float32. llama.cpp's own quantizer makes `Q4_K_M` and its like, which are mixtures of types that
it chooses, and `Q6_K` if no rounding is named.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import MissingExtra
from pipeline.quantization.formats import FileWeights, Format
from pipeline.quantization.formats.gguf.sizes import TABLE as TABLE_TYPE
from pipeline.quantization.formats.gguf.sizes import stored_type
from pipeline.quantization.grid import Grid, SuperBlock
from pipeline.quantization.layers import Output, Source
from pipeline.system.libraries import is_installed

_F16, _K_QUANT = torch.float16, SuperBlock(8, 63, torch.float16)
GRIDS = {
    "Q8_0": Grid(8, 32, "none", _F16),
    "Q4_0": Grid(4, 32, "none", _F16),
    "Q5_0": Grid(5, 32, "none", _F16),
    "Q4_1": Grid(4, 32, "float", _F16, from_zero=True),
    "Q5_1": Grid(5, 32, "float", _F16, from_zero=True),
    "Q4_K": Grid(4, 32, "float", torch.float32, from_zero=True, super_block=_K_QUANT),
    "Q5_K": Grid(5, 32, "float", torch.float32, from_zero=True, super_block=_K_QUANT),
    "Q6_K": Grid(6, 16, "none", torch.float32, super_block=SuperBlock(16, 127, torch.float16)),
}


def type_of(grid: Grid) -> str:
    """Return GGUF's name for weights on a grid."""
    return next(name for name, known in GRIDS.items() if known == grid)


class Gguf(Format):
    """Variants that are one file for llama.cpp."""

    TABLE = GRIDS[TABLE_TYPE]
    holds_experts = True

    def grid(self, spec: VariantSpec, width: int) -> Grid | None:
        """Return the grid of a layer; None for variants of 16 bits, and for those that llama.cpp quantizes."""
        if spec.rounding is None:
            return None
        return GRIDS[stored_type(spec.variant.file_type or "", width)]

    def to_round(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of a weight in float32, because a scale of float16 is more exact than one of bfloat16."""
        return rows.float()

    def check(self, spec: VariantSpec, folder: Path) -> None:
        """Raise if llama.cpp, or this writer, does not know a model, or a needed package is not installed.

        Raises:
            ModelError: with the part of the model that is not known.
            MissingExtra: if the package `gguf`, or that of the variant's own quantizer, is not installed.
        """
        from pipeline.quantization.formats.gguf.header import describe

        _check_installed(spec)
        describe(folder, "model", spec.variant.file_type or "")

    def check_architecture(self, kind: str | None) -> None:
        """Raise ModelError if models with this `model_type` cannot be stored so."""
        from pipeline.quantization.formats.gguf.names import architecture

        architecture(kind)

    def output(self, spec: VariantSpec, folder: Path, source: Source, others: Iterable[Output]) -> Output:
        """Return the output that writes the file; those that llama.cpp quantizes share one full file."""
        from pipeline.quantization.formats.gguf.file import GgufFile
        from pipeline.quantization.formats.gguf.k_quants import FullFile, KQuantsFile

        if not spec.quantizer:
            return GgufFile(spec, folder, source)
        _check_installed(spec)
        full = next((other for other in others if isinstance(other, GgufFile) and other.is_whole), None)
        return KQuantsFile(spec, folder, full or FullFile(spec, folder, source))

    def weights_of_file(self, path: Path, names: Iterable[str], dtype: torch.dtype) -> FileWeights:
        """Return the dequantized weights of a file that was made of a checkpoint with tensors of these names."""
        from pipeline.quantization.formats.gguf.reader import GgufWeights

        return GgufWeights(path, names, dtype)


FORMAT = Gguf()


def _check_installed(spec: VariantSpec) -> None:
    """Raise MissingExtra if a package that writes the variant is not installed."""
    for module, extra in spec.requires:
        if not is_installed(module):
            raise MissingExtra(spec.name, extra)
