"""What int4 in tiles is stored as, part by part, and so how many bytes it takes. Imports no torch."""

from __future__ import annotations

from pipeline.config.catalog import fitting_group_size
from pipeline.config.quantize import VariantSpec
from pipeline.quantization.formats.torchao.sizes import Parts, misfit, parts_bytes, plain_bytes, table_bytes

__all__ = ["layer_bytes", "misfit", "padded", "parts", "plain_bytes", "table_bytes"]

ROW_MULTIPLE = 8
WIDTH_MULTIPLE = 1024


def padded(rows: int, width: int) -> tuple[int, int]:
    """Return the shape in whole tiles."""
    return rows + -rows % ROW_MULTIPLE, width + -width % WIDTH_MULTIPLE


def parts(shape: tuple[int, ...], group_size: int) -> Parts:
    """Return the stored parts of an int4 weight (N, K) with `group_size` columns to a scale."""
    rows, width = padded(*shape)
    return {
        "qdata": ("int32", (rows // 8, width // 128, 32, 4)),
        "scale_and_zero": ("bfloat16", (width // group_size, rows, 2)),
    }


def layer_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> int:
    """Return the bytes of a layer's weight (N, K)."""
    group_size = spec.group_size and fitting_group_size(shape[1], spec.group_size)
    return parts_bytes(parts(shape, group_size or shape[1]))
