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

from collections.abc import Iterable
from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import MissingExtra, QuantizationError
from pipeline.quantization.formats import FileWeights, Format
from pipeline.quantization.formats.gguf.sizes import FILLED, GROUP
from pipeline.quantization.formats.gguf.sizes import TABLE as TABLE_TYPE
from pipeline.quantization.grid import Grid
from pipeline.quantization.layers import Output, Source
from pipeline.system.libraries import is_installed

# One number a group is the scale; the second is a minimum, from which codes count up.
GRIDS = {
    kind: Grid(bits, GROUP, "none" if numbers == 1 else "float", torch.float16, from_zero=numbers > 1)
    for kind, (bits, numbers) in FILLED.items()
}


def type_of(grid: Grid) -> str:
    """Return GGUF's name for weights on a grid."""
    return next(name for name, known in GRIDS.items() if known == grid)


class Gguf(Format):
    """Variants that are one file for llama.cpp."""

    TABLE = GRIDS[TABLE_TYPE]

    def grid(self, spec: VariantSpec, width: int) -> Grid | None:
        """Return the grid of a layer; None for variants of 16 bits, and for K-quants, which have their own."""
        if spec.variant.group_size is None:
            return None
        if width % GROUP:
            raise QuantizationError(
                f"{spec.name}: groups of {GROUP} do not divide a width of {width}; "
                "name such layers under 'keep' to leave them as they are"
            )
        return GRIDS[spec.variant.file_type or ""]

    def check(self, spec: VariantSpec, folder: Path) -> None:
        """Raise if llama.cpp, or this writer, does not know a model, or a needed package is not installed.

        Raises:
            ModelError: with the part of the model that is not known.
            MissingExtra: if the package `gguf`, or that of the variant's own quantizer, is not installed.
        """
        from pipeline.quantization.formats.gguf.header import describe

        _check_quantizer(spec)
        describe(folder, "model", spec.variant.file_type or "")

    def check_architecture(self, kind: str | None) -> None:
        """Raise ModelError if models with this `model_type` cannot be stored so."""
        from pipeline.quantization.formats.gguf.names import architecture

        architecture(kind)

    def output(self, spec: VariantSpec, folder: Path, source: Source, others: Iterable[Output]) -> Output:
        """Return the output that writes the file; K-quants of a pass share one full file."""
        from pipeline.quantization.formats.gguf.file import GgufFile
        from pipeline.quantization.formats.gguf.k_quants import FullFile, KQuantsFile

        if not spec.variant.quantizer:
            return GgufFile(spec, folder, source)
        _check_quantizer(spec)
        full = next((other for other in others if isinstance(other, GgufFile) and other.is_whole), None)
        return KQuantsFile(spec, folder, full or FullFile(spec, folder, source))

    def weights_of_file(self, path: Path, names: Iterable[str], dtype: torch.dtype) -> FileWeights:
        """Return the dequantized weights of a file that was made of a checkpoint with tensors of these names."""
        from pipeline.quantization.formats.gguf.reader import GgufWeights

        return GgufWeights(path, names, dtype)


FORMAT = Gguf()


def _check_quantizer(spec: VariantSpec) -> None:
    """Raise MissingExtra if the variant has a quantizer of its own, and that is not installed."""
    if spec.variant.quantizer and not is_installed("llama_cpp"):
        raise MissingExtra(spec.name, "llama-cpp")
