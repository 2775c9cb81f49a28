"""Rows of weights as ggml stores them. Layouts: ggml/src/ggml-common.h, `block_q8_0` and its like.

A row of K columns is K / 32 blocks, each of them

    Q8_0   s f16, 32 codes of a byte
    Q4_0   s f16, 16 bytes: column j in the low nibble of byte j, column j + 16 in the high one
    Q4_1   s f16, m f16, 16 bytes
    Q5_0   s f16, 32 bits: the highest bit of every column's code, 16 bytes of the lower four
    Q5_1   s f16, m f16, 32 bits, 16 bytes

and of K-quants K / 256 blocks, with the integers of scales (N, 16 or 8) and minimums times numbers d and dmin

    Q4_K   d f16, dmin f16, 12 bytes of integers, 4 times 32 bytes: a group's nibbles low, the next group's high
    Q5_K   d f16, dmin f16, 12 bytes of integers, 32 bytes: the highest bit of group g's codes as bit g, then as Q4_K
    Q6_K   2 times 64 bytes of the lower four bits, 2 times 32 of the upper two, 16 integers of a byte, d f16

in which codes of 4 to 6 bits are stored from 0 on. All numbers are little-endian.
"""

from __future__ import annotations

import torch

from pipeline.errors import QuantizationError
from pipeline.quantization.grid import GroupQuantized, SuperBlock

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = 2 ** torch.arange(8, dtype=torch.uint8)


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
    codes = block.codes - grid.lowest if grid.signed and grid.bits < 8 else block.codes
    codes = codes.contiguous().view(torch.uint8)  # a negative difference wraps around to what is meant
    if grid.super_block is not None:
        return torch.cat(_k_quants(codes, block, grid.super_block), dim=-1).flatten(1)
    codes = codes.view(rows, groups, -1)
    parts = [_bytes_of(part.unsqueeze(-1)) for part in numbers]
    if grid.bits == 8:
        return torch.cat([*parts, codes], dim=-1).flatten(1)
    if grid.bits == 5:
        parts.append(((codes >> 4).view(rows, groups, -1, 8) * _BITS).sum(dim=-1, dtype=torch.uint8))
    low, high = (codes & 0xF).view(rows, groups, 2, -1).unbind(2)
    return torch.cat([*parts, low | high << 4], dim=-1).flatten(1)


def _bytes_of(numbers: torch.Tensor) -> torch.Tensor:
    """Return the bytes (..., n * size) of numbers (..., n)."""
    return numbers.contiguous().view(torch.uint8)


def _split(values: torch.Tensor, of: SuperBlock, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers (N, S, 1) and the integers (N, S, groups) int8 whose products the values (N, G) are.

    Raises:
        QuantizationError: if they are no such products, or negative ones that must not be.
    """
    number, integers = of.split(values)
    is_exact = torch.equal((number.float().unsqueeze(-1) * integers).flatten(1), values)
    if not is_exact or not signed and (integers < 0).any():
        raise QuantizationError("has scales or minimums that its type cannot store; its rounding must fit them")
    return number.unsqueeze(-1), integers.to(torch.int8)


def _k_quants(codes: torch.Tensor, block: GroupQuantized, of: SuperBlock) -> list[torch.Tensor]:
    """Return the parts (N, S, bytes) of super-blocks, in their order, for codes (N, K) uint8."""
    number, scales = _split(block.scale, of, block.zero is None)
    rows, blocks, _ = number.shape
    if block.zero is None:
        halves = codes.view(rows, blocks, 2, 4, -1)  # 4 times 32 columns share 64 bytes
        low, high = halves & 0xF, halves >> 4
        low = low[..., :2, :] | low[..., 2:, :] << 4
        high = (high * _BITS[::2].view(-1, 1)).sum(dim=3, dtype=torch.uint8)
        return [low.flatten(2), high.flatten(2), _bytes_of(scales), _bytes_of(number)]
    least, minimums = _split(-block.zero, of, signed=False)
    scales, minimums = scales.view(torch.uint8), minimums.view(torch.uint8)
    integers = [part[..., :4] | part[..., 4:] >> 4 << 6 for part in (scales, minimums)]
    integers.append(scales[..., 4:] & 0xF | (minimums[..., 4:] & 0xF) << 4)
    parts = [_bytes_of(number), _bytes_of(least), *integers]
    if block.grid.bits == 5:
        groups = (codes >> 4).view(rows, blocks, 8, -1)
        parts.append((groups * _BITS.view(-1, 1)).sum(dim=2, dtype=torch.uint8))
    low, high = (codes & 0xF).view(rows, blocks, 4, 2, -1).unbind(3)
    return [*parts, (low | high << 4).flatten(2)]
