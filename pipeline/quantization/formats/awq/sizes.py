"""What AWQ stores of a weight, part by part, and so how many bytes it takes. Imports no torch.

It has no `table_bytes`: embeddings and output heads stay as they are.
"""

from __future__ import annotations

from pipeline.config.quantize import VariantSpec
from pipeline.quantization.formats.gptq.sizes import CODES, misfit
from pipeline.quantization.formats.torchao.sizes import Parts, parts_bytes, plain_bytes

__all__ = ["layer_bytes", "misfit", "parts", "plain_bytes"]


def parts(shape: tuple[int, ...], group_size: int) -> Parts:
    """Return the stored parts of a weight (N, K) with `group_size` columns to a scale."""
    (rows, width), groups = shape, shape[1] // group_size
    return {
        "qweight": ("int32", (width, rows // CODES)),
        "qzeros": ("int32", (groups, rows // CODES)),
        "scales": ("float16", (groups, rows)),
    }


def layer_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> int:
    """Return the bytes of a layer's weight (N, K)."""
    return parts_bytes(parts(shape, spec.group_size or shape[1]))
