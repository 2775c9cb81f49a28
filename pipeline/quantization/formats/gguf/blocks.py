"""Rows of weights as ggml stores them. Layouts: ggml/src/ggml-common.h, `block_q8_0` and its like.

A row of K columns is K / 32 blocks, each of them

    Q8_0   s f16, 32 codes of a byte
    Q4_0   s f16, 16 bytes: column j in the low nibble of byte j, column j + 16 in the high one
    Q4_1   s f16, m f16, 16 bytes
    Q5_0   s f16, 32 bits: the highest bit of every column's code, 16 bytes of the lower four
    Q5_1   s f16, m f16, 32 bits, 16 bytes

in which codes of 4 and 5 bits are stored from 0 on. All numbers are little-endian.
"""

from __future__ import annotations

import torch

from pipeline.errors import QuantizationError
from pipeline.quantization.formats.gguf import sizes
from pipeline.quantization.grid import Grid, GroupQuantized

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def row_bytes(kind: str, width: int, grid: Grid | None = None) -> int:
    """Return the bytes of a row of `width` columns in a plain type, or on `grid`."""
    if grid is None:
        return PLAIN[kind].itemsize * width
    return sizes.row_bytes(grid.bits, 2 if grid.zero == "float" else 1, width)


def plain(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Convert rows (N, ...) of any float type to bytes (N, row_bytes) uint8.

    Raises:
        QuantizationError: if float16 cannot hold a finite value.
    """
    stored = rows.to(PLAIN[kind]).contiguous()
    if kind == "F16" and stored.isinf().sum() != rows.isinf().sum():
        raise QuantizationError("has values that float16 cannot hold; take bf16 instead")
    return stored.view(len(rows), -1).view(torch.uint8)


def pack(block: GroupQuantized) -> torch.Tensor:
    """Convert a quantized weight (N, K) to the bytes of its rows, (N, row_bytes) uint8.

    Raises:
        QuantizationError: if float16 cannot hold a scale or a minimum.
    """
    grid = block.grid
    rows, groups = block.scale.shape
    numbers = [block.scale] if block.zero is None else [block.scale, block.zero]
    if not all(part.isfinite().all() for part in numbers):
        raise QuantizationError("has groups whose scale float16 cannot hold")
    parts = [part.contiguous().view(torch.uint8).view(rows, groups, 2) for part in numbers]
    codes = block.codes.contiguous().view(torch.uint8).view(rows, groups, sizes.GROUP)
    if grid.bits == 8:
        return torch.cat([*parts, codes], dim=-1).flatten(1)
    codes = codes - grid.lowest if grid.signed else codes  # which wraps around to what is meant
    if grid.bits == 5:
        parts.append(((codes >> 4).view(rows, groups, -1, 8) * _BITS).sum(dim=-1, dtype=torch.uint8))
    low, high = (codes & 0xF).view(rows, groups, 2, -1).unbind(2)
    return torch.cat([*parts, low | high << 4], dim=-1).flatten(1)
