"""How many bytes weights take in GGUF. Imports no torch."""

from __future__ import annotations

import math

from pipeline.config.quantize import VariantSpec
from pipeline.models.gguf_metadata import BLOCKS

TABLE = "Q8_0"  # the type of embeddings and output heads, if they are quantized
# Bits a weight of types that llama.cpp mixes itself: figures of whole models.
MIXED = {"Q4_K_M": 4.85, "Q5_K_M": 5.7, "Q6_K": 6.57}
# K-quants have blocks of 256 columns. A matrix with another width gets the next larger of the older types.
INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BEST = "Q6_K"  # the type that llama.cpp gives embeddings and output heads in K-quants


def row_bytes(kind: str, width: int) -> int:
    """Return the bytes of a row of `width` columns in a type."""
    columns, count = BLOCKS[kind]
    return width // columns * count


def stored_type(kind: str, width: int) -> str:
    """Return the type of a matrix with `width` columns: `kind`, or that in the place of a K-quant."""
    return INSTEAD[kind] if kind in INSTEAD and width % BLOCKS[kind][0] else kind


def layer_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> float:
    """Return the bytes of a layer's weight (N, K)."""
    rows, width = shape
    kind = spec.variant.file_type or ""
    found = stored_type(kind.removesuffix("_M"), width)
    if spec.quantizer and found not in INSTEAD.values():
        return MIXED[kind] / 8 * rows * width
    return rows * row_bytes(found, width)


def table_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> float:
    """Return the bytes of an embedding or an output head (N, K)."""
    rows, width = shape
    kind = stored_type(BEST, width) if spec.quantizer else TABLE
    return (MIXED[kind] / 8 * rows * width) if kind in MIXED else rows * row_bytes(kind, width)


def plain_bytes(spec: VariantSpec, shape: tuple[int, ...], item_bytes: float) -> float:
    """Return the bytes of a tensor that is not quantized: vectors are float32, and 16 bits are asked for or kept."""
    if len(shape) == 1:
        return row_bytes("F32", shape[0])
    if spec.variant.bits == 16:
        item_bytes = row_bytes(spec.variant.file_type or "", 1)
    return item_bytes * math.prod(shape)


def misfit(spec: VariantSpec, shape: tuple[int, ...]) -> str | None:
    """Return the reason why a weight (N, K) cannot be stored in the type of a variant; None if it can."""
    if spec.rounding is None:
        return None
    group, _ = BLOCKS[stored_type(spec.variant.file_type or "", shape[1])]
    return f"groups of {group} do not divide a width of {shape[1]}" if shape[1] % group else None
