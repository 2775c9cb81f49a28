"""What torchao's tensors are stored as, part by part, and so how many bytes they take. Imports no torch."""

from __future__ import annotations

import math

from pipeline.config.catalog import GROUP_SIZES, fitting_group_size
from pipeline.config.quantize import VariantSpec

Parts = dict[str, tuple[str, tuple[int, ...]]]  # part -> its dtype and shape
ITEM_BYTES = {
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "bfloat16": 2,
    "float16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
}


def parts(shape: tuple[int, ...], bits: int, group_size: int) -> Parts:
    """Return the stored parts of a weight (N, K), or of a stack (E, N, K), with `group_size` columns to a scale."""
    *rows, width = shape
    groups = width // group_size
    if bits == 8:
        scales = (*rows, groups)
        return {"qdata": ("int8", shape), "scale": ("float32", scales), "zero_point": ("int8", scales)}
    scales = (groups, *rows)
    return {"qdata": ("int8", (*rows, width // 2)), "scale": ("bfloat16", scales), "zero_point": ("bfloat16", scales)}


def parts_bytes(stored: Parts) -> int:
    """Return the bytes of stored parts."""
    return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in stored.values())


def layer_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> int:
    """Return the bytes of a layer's weight (N, K)."""
    group_size = spec.group_size and fitting_group_size(shape[1], spec.group_size)
    return parts_bytes(parts(shape, spec.variant.bits, group_size or shape[1]))


def table_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> int:
    """Return the bytes of a weight (N, K) in eight bits, one scale a row."""
    return parts_bytes(parts(shape, 8, shape[1]))


def plain_bytes(spec: VariantSpec, shape: tuple[int, ...], item_bytes: float) -> float:
    """Return the bytes of a tensor that stays as it is."""
    return item_bytes * math.prod(shape)


def misfit(spec: VariantSpec, shape: tuple[int, ...]) -> str | None:
    """Return the reason why no group size fits a weight (N, K); None if one does."""
    width, size = shape[1], spec.group_size
    if size is None or fitting_group_size(width, size) is not None:
        return None
    return f"no group size of {', '.join(map(str, GROUP_SIZES))} up to {size} divides a width of {width}"
