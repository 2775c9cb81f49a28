"""int8 and int4 linear layers on a CPU, on the kernels that torch carries.

For a few tokens the time is that of reading the weights, so fewer bytes are faster;
for many it is arithmetic, and turning the weights back into numbers of the type that this
machine multiplies fast, in blocks of rows that stay in the cache, is cheaper. Both work from
one copy of the codes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from pipeline.config.catalog import GROUP_SIZES
from pipeline.inference.kernels.products import float32_product, product_dtype, row_blocks
from pipeline.quantization.grid import GroupQuantized, in_groups

# Tokens up to which the kernels are faster than dequantizing; `scripts/benchmark_decode.py --layers` measures it. The
# figures were the same with AVX-512 and products in bfloat16 as with AVX2 and products in float32, within a third, and
# next to them both ways take about the same time. So they are not measured on each machine.
INT8_KERNEL_TOKENS = 20
INT8_GROUP_KERNEL_TOKENS = 8  # in groups of 32: 5, of 128: 14
INT4_KERNEL_TOKENS = 48
_ROW_MULTIPLE = 64  # int4 rows are padded to whole blocks of the packing; `row_blocks` are whole ones too
# `_weight_int8pack_mm` reads whole vectors from aligned addresses and checks neither: a width
# that is no multiple of this gives wrong numbers, and codes at an odd address end the process.
_INT8_WIDTH_BLOCK = 32
_ALIGNMENT = 64  # bytes; what torch's own allocations have, and tensors mapped from a file have not


def linear(weight: GroupQuantized, bias: torch.Tensor | None) -> torch.nn.Module | None:
    """Return a layer for the grid of `weight`; None if torch has no kernel for it."""
    width, grid = weight.codes.shape[1], weight.grid
    group = grid.group(width)
    if grid.values != "integer":
        return None
    if grid.bits == 8 and grid.zero == "none" and group % _INT8_WIDTH_BLOCK == 0:
        if grid.group_size is None:
            return Int8Linear(weight, bias)
        if len(weight.codes) * group % _ALIGNMENT == 0:
            return Int8GroupLinear(weight, bias)
    if grid.bits == 4 and grid.group_size in GROUP_SIZES and not grid.from_zero and int4_block() is not None:
        return Int4Linear(weight, bias)
    return None


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, contiguous and aligned for the kernels; it is copied only if needed."""
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class PackedLinear(torch.nn.Module):
    """y = x W^T + b with W as codes: `_few` for up to `kernel_tokens` inputs, `_many` above.

    State dicts do not hold the packed tensors; `portable` returns the stored ones.
    """

    kernel_tokens: int
    bias: torch.Tensor | None

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.grid = weight.grid
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., K) times the transposed weight, plus the bias: (..., N)."""
        flat = x.reshape(-1, self.in_features).contiguous()
        y = self._few(flat) if flat.shape[0] <= self.kernel_tokens else self._many(flat)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def portable(self) -> GroupQuantized:
        """Return the codes, scales and zeros that the layer was made from."""
        raise NotImplementedError

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with at most `kernel_tokens` rows."""
        raise NotImplementedError

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with any number of rows."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        group = "" if self.grid.group_size is None else f", group_size={self.grid.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}{group}"


class Int8Linear(PackedLinear):
    """W as int8 codes (N, K) and one scale per row, float32 (N).

    The scales are used in the input's type. torchao computes them in the weights' type,
    so for a bf16 model they are bf16 numbers and nothing is lost.
    """

    kernel_tokens = INT8_KERNEL_TOKENS
    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None):
        super().__init__(weight, bias)
        self.register_buffer("codes", _aligned(weight.codes), persistent=False)
        self.register_buffer("scale", _aligned(weight.scale.view(-1)), persistent=False)
        self._rounded = self.scale

    def portable(self) -> GroupQuantized:
        """Return the codes and scales that the layer was made from."""
        return GroupQuantized(self.codes, self.scale.unsqueeze(-1).to(self.grid.scale_dtype), None, self.grid)

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        if self._rounded.dtype != x.dtype:
            self._rounded = self.scale.to(x.dtype)
        return _int8(x, self.codes, self._rounded)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        dtype = product_dtype(x.dtype)
        x, y, scale = x.to(dtype), x.new_empty(len(x), self.out_features), self.scale.to(dtype)
        blocks = row_blocks(self.out_features, self.in_features)
        room = x.new_empty(blocks[0].stop, self.in_features)
        for rows in blocks:
            block = room[: rows.stop - rows.start].copy_(self.codes[rows])
            _multiply(x, block, y[:, rows], scale[rows])
        return y


class Int8GroupLinear(PackedLinear):
    """W as int8 codes, group by group, (G, N, K / G), and a scale for each, float32 (G, N).

    torch has no kernel for groups; the one for rows, called for each group, adds up to the same.
    """

    kernel_tokens = INT8_GROUP_KERNEL_TOKENS
    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None):
        super().__init__(weight, bias)
        codes = in_groups(weight.codes, self.grid).transpose(0, 1)
        self.register_buffer("codes", codes.contiguous(), persistent=False)
        self.register_buffer("scale", weight.scale.T.contiguous(), persistent=False)
        self._rounded = self.scale

    def portable(self) -> GroupQuantized:
        """Return the codes and scales that the layer was made from."""
        codes = self.codes.transpose(0, 1).flatten(1)
        return GroupQuantized(codes, self.scale.T.contiguous().to(self.grid.scale_dtype), None, self.grid)

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        # The kernel is six times slower in float32. The sum of its rounded results is as exact as one more rounding.
        if self._rounded.dtype != x.dtype:
            self._rounded = self.scale.to(x.dtype)
        parts = x.view(len(x), len(self.codes), -1).transpose(0, 1).contiguous()
        y = torch.zeros(len(x), self.out_features)
        for part, codes, scale in zip(parts, self.codes, self._rounded, strict=True):
            y += _int8(part, codes, scale)
        return y.to(x.dtype)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        dtype = product_dtype(x.dtype)
        x, y, scale = x.to(dtype), x.new_empty(len(x), self.out_features), self.scale.T.to(dtype).unsqueeze(-1)
        blocks = row_blocks(self.out_features, self.in_features)
        room = x.new_empty(blocks[0].stop, self.in_features)
        for rows in blocks:
            block = room[: rows.stop - rows.start]
            in_groups(block, self.grid).copy_(self.codes[:, rows].transpose(0, 1)).mul_(scale[rows])
            _multiply(x, block, y[:, rows])
        return y


class Int4Linear(PackedLinear):
    """W as int4 codes packed for this processor, scale and zero per group. Integer zeros become float ones.

    Shapes: packed (N', K / 2) uint8; scale_and_zero (K / group, N', 2) in the type of stored scales; N' is N
    rounded up to a multiple of 64. `pack_int4` describes the packing.
    """

    kernel_tokens = INT4_KERNEL_TOKENS
    packed: torch.Tensor
    scale_and_zero: torch.Tensor
    group_size: int
    _packed_rows: int

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None):
        super().__init__(weight, bias)
        weight = weight.with_float_zero()
        packed_rows, group_size = int4_block(), weight.grid.group_size
        assert packed_rows and group_size, "`linear` makes no such layer otherwise"
        self._packed_rows, self.group_size = packed_rows, group_size
        padding = -self.out_features % _ROW_MULTIPLE
        rows = torch.nn.functional.pad
        codes = rows(weight.codes, (0, 0, 0, padding)) if padding else weight.codes
        packed = torch.empty(len(codes), self.in_features // 2, dtype=torch.uint8)
        for block in row_blocks(len(codes), self.in_features):
            packed[block] = pack_int4(codes[block], self._packed_rows)
        assert weight.zero is not None, "int4 has zeros"
        scale, zero = (rows(t.T, (0, padding)) for t in (weight.scale, weight.zero))
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale_and_zero", torch.stack((scale, zero), dim=-1).contiguous(), persistent=False)

    def portable(self) -> GroupQuantized:
        """Return the codes, scales and zeros that the layer was made from."""
        half = self._packed_rows // 2
        columns = self.packed.view(-1, self.in_features, half)
        grid = replace(self.grid, zero="float")
        codes = torch.cat((columns & 0xF, columns >> 4), dim=-1).view(torch.int8) + grid.lowest
        codes = codes.transpose(1, 2).reshape(-1, self.in_features)
        scale, zero = (t[:, : self.out_features].T.contiguous() for t in self.scale_and_zero.unbind(-1))
        return GroupQuantized(codes[: self.out_features], scale, zero, grid).from_float_zero(self.grid)

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        y = _int4(x, self.packed, self.scale_and_zero, self.group_size)
        return y if y.shape[1] == self.out_features else y[:, : self.out_features]

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        dtype, group, rows = product_dtype(x.dtype), self.group_size, len(self.packed)
        x, y = x.to(dtype), x.new_empty(len(x), rows)
        scale, zero = (t.contiguous() for t in self.scale_and_zero.to(dtype).unbind(-1))
        scale = scale / 16  # `_columns` leaves codes in the high half of a byte
        blocks = row_blocks(rows, self.in_features)
        room = x.new_empty(blocks[0].stop * self.in_features)
        for block in blocks:
            columns = self._columns(block, room[: (block.stop - block.start) * self.in_features])
            groups = columns.view(-1, group, columns.shape[1])
            torch.addcmul(zero[:, None, block], groups, scale[:, None, block], out=groups)
            _multiply(x, columns.T, y[:, block])
        return y[:, : self.out_features]

    def _columns(self, rows: slice, room: torch.Tensor) -> torch.Tensor:
        """Return 16 times the signed codes of `rows`, transposed (K, rows), written to `room`."""
        size = self._packed_rows
        packed = self.packed[rows].view(-1, self.in_features, size // 2).permute(1, 0, 2)
        signed = (packed ^ 0x88).view(torch.int8)  # a nibble less eight, in two's complement
        columns = room.view(self.in_features, -1, 2, size // 2)
        columns[:, :, 0] = signed << 4
        columns[:, :, 1] = signed & -16
        return room.view(self.in_features, -1)


def _multiply(x: torch.Tensor, block: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Write x (T, K) times the transposed `block` (n, K), with a factor for each column if asked, to `out` (T, n)."""
    if x.dtype == torch.float32:
        part = float32_product(x, block)
        out.copy_(part if scale is None else part.mul_(scale))  # rounded once, when it is scaled
    else:
        torch.mm(x, block.T, out=out)
        if scale is not None:
            out.mul_(scale)


def _int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x (T, K) times the transposed weight with `codes` (N, K) and `scale` (N): (T, N)."""
    return torch.ops.aten._weight_int8pack_mm(_aligned(x), codes, scale.to(x.dtype))


def _int4(x: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return x (T, K) times the transposed weight in the packing of `Int4Linear`: (T, N')."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        _aligned(x), packed, group_size, scale_and_zero.to(x.dtype).contiguous()
    )


def pack_int4(codes: torch.Tensor, size: int) -> torch.Tensor:
    """Pack signed codes (N, K), N a multiple of `size`, to (N, K / 2) uint8, as torch packs `size` rows together.

    The bytes of a block go column by column; in each column the low nibbles are the block's
    first half of rows, the high nibbles its second. The function of torch needs four bytes a
    code and six times as long.
    """
    rows, width = codes.shape
    low, high = (codes.view(torch.uint8) + 8).view(-1, 2, size // 2, width).unbind(1)
    return (low | high << 4).transpose(1, 2).reshape(rows, width // 2)


@cache
def int4_block() -> int | None:
    """Return the rows that torch packs together here: 64 with AVX-512, 32 with AVX2; None for an unknown packing."""
    numbers = torch.arange(_ROW_MULTIPLE * 32, dtype=torch.int32).view(_ROW_MULTIPLE, 32)
    unsigned = (numbers * 7 + numbers // 32 * 3) % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1).view(torch.uint8)
    for size in (64, 32):
        if torch.equal(packed, pack_int4((unsigned - 8).to(torch.int8), size)):
            return size
    return None
