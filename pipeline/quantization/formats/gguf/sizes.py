"""How many bytes weights take in GGUF. Imports no torch."""

from __future__ import annotations

import math

from pipeline.config.quantize import VariantSpec

GROUP = 32
PLAIN_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # an element
FILLED = {"Q8_0": (8, 1), "Q4_0": (4, 1), "Q5_0": (5, 1), "Q4_1": (4, 2), "Q5_1": (5, 2)}  # bits; float16 a group
TABLE = "Q8_0"  # the type of embeddings and output heads, if they are quantized
# Bits a weight of K-quants, which are mixtures of types that llama.cpp chooses: figures of whole models.
MIXED = {"Q4_K_M": 4.85, "Q5_K_M": 5.7, "Q6_K": 6.57}
# K-quants have blocks of 256. llama.cpp gives a matrix with another width the next larger of the older types.
BLOCK, INSTEAD = 256, {"Q4_K_M": 5.5, "Q5_K_M": 6.0, "Q6_K": 8.5}
BEST = "Q6_K"  # the type that K-quants give embeddings and output heads


def row_bytes(bits: int, numbers: int, width: int) -> int:
    """Return the bytes of a row in groups of 32 columns, each with so many numbers of float16."""
    return (2 * numbers + bits * GROUP // 8) * (width // GROUP)


def layer_bytes(spec: VariantSpec, shape: tuple[int, int]) -> float:
    """Return the bytes of a layer's weight (N, K)."""
    return _bytes(spec.variant.file_type or "", shape)


def table_bytes(spec: VariantSpec, shape: tuple[int, int]) -> float:
    """Return the bytes of an embedding or an output head (N, K)."""
    return _bytes(BEST if spec.variant.quantizer else TABLE, shape)


def plain_bytes(spec: VariantSpec, shape: tuple[int, ...], item_bytes: float) -> float:
    """Return the bytes of a tensor that is not quantized: vectors are float32, and 16 bits are asked for or kept."""
    if len(shape) == 1:
        item_bytes = PLAIN_BYTES["F32"]
    elif spec.variant.file_type in PLAIN_BYTES:
        item_bytes = PLAIN_BYTES[spec.variant.file_type]
    return item_bytes * math.prod(shape)


def _bytes(kind: str, shape: tuple[int, int]) -> float:
    rows, width = shape
    if kind in FILLED:
        return rows * row_bytes(*FILLED[kind], width)
    if kind in PLAIN_BYTES:
        return PLAIN_BYTES[kind] * rows * width
    return (INSTEAD if width % BLOCK else MIXED)[kind] / 8 * rows * width
