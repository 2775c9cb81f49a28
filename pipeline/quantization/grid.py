"""Integer codes on a grid, which roundings produce and formats store.

A `Grid` defines the values of a weight. `GroupQuantized` is a weight on a grid.
`GroupQuantized.dequantize` defines the meaning of the codes for every rounding, format and kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

# The smallest step; a group of equal weights has no range to divide by. torchao's choice.
SMALLEST_STEP = torch.finfo(torch.float32).eps
E4M3_HIGHEST = 448  # the largest number of float8_e4m3fn


@dataclass(frozen=True)
class SuperBlock:
    """Neighbouring groups whose scales are integers times one number, as in the K-quants of GGUF.

    Their float zeros are integers times another number, and are never positive. The integers of such scales are not
    negative. One integer of a super-block has the largest size, so the products alone tell the number.

    Attributes:
        groups: groups of a super-block.
        highest: the largest integer.
        dtype: dtype of the number.
    """

    groups: int
    highest: int
    dtype: torch.dtype

    def split(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers (N, S) and the integers (N, S, groups) whose products are nearest to `values` (N, G).

        The integers are whole numbers in float32. The number is 0 if it is too small for its dtype.
        """
        parts = values.float().view(len(values), -1, self.groups)
        size = parts.abs()
        largest = size.amax(dim=-1, keepdim=True)
        number = (largest / self.highest).to(self.dtype)
        integers = (parts / number.float()).round_().clamp_(-self.highest, self.highest)
        integers = torch.where(size == largest, parts.sign() * self.highest, integers)
        return number.squeeze(-1), torch.where(number == 0, 0, integers)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the float32 values (N, G) nearest to `values` that are integers times one number."""
        number, integers = self.split(values)
        return (number.float().unsqueeze(-1) * integers).view(values.shape)


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take.

    Attributes:
        bits: width of a code.
        group_size: columns that share a scale; None means a whole row.
        zero: "none" for w = q * s with signed codes; "integer" for w = (q - z) * s with
            unsigned codes; "float" for w = q * s + z with signed codes and z in `scale_dtype`.
        scale_dtype: dtype of stored scales and float zeros.
        from_zero: with a float zero, codes are unsigned and begin at 0, so that the zero is the lowest number
            (GGUF); otherwise they are signed (torchao).
        positive: True if scales must be positive, as kernels of servers expect; otherwise a grid without zeros may
            have negative ones.
        values: "integer" for whole numbers; "e4m3" for float8 numbers of that name, up to 448, without a zero.
        super_block: the groups whose scales depend on each other; None if each group has a scale of its own.
    """

    bits: int
    group_size: int | None
    zero: Literal["none", "integer", "float"]
    scale_dtype: torch.dtype
    from_zero: bool = False
    positive: bool = False
    values: Literal["integer", "e4m3"] = "integer"
    super_block: SuperBlock | None = None

    @property
    def code_dtype(self) -> torch.dtype:
        """Return the dtype of stored codes."""
        if self.values == "e4m3":
            return torch.float8_e4m3fn
        return torch.int8 if self.signed else torch.uint8

    @property
    def signed(self) -> bool:
        """Return True if codes may be negative."""
        return self.zero != "integer" and not self.from_zero

    @property
    def lowest(self) -> int:
        """Return the smallest code."""
        if self.values == "e4m3":
            return -self.highest
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        """Return the largest code."""
        if self.values == "e4m3":
            return E4M3_HIGHEST
        return self.lowest + (1 << self.bits) - 1

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Overwrite values, float32, with the nearest codes, and return them."""
        if self.values == "e4m3":
            return values.copy_(values.clamp_(self.lowest, self.highest).to(self.code_dtype))
        return values.round_().clamp_(self.lowest, self.highest)

    def group(self, width: int) -> int:
        """Return the columns per scale in a row of `width` columns."""
        return width if self.group_size is None else self.group_size

    def stored(self, scale: torch.Tensor, zero: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales and float zeros (N, G) that the grid can store nearest to these."""
        if self.super_block is None:
            scale = scale.to(self.scale_dtype)
            scale = scale.clamp(min=SMALLEST_STEP) if self.positive else scale
            return scale, None if zero is None else zero.to(self.scale_dtype)
        if zero is None:
            return self.super_block.nearest(scale), None
        return self.super_block.nearest(scale.clamp(min=0)), -self.super_block.nearest(zero.neg().clamp_(min=0))


@dataclass(frozen=True)
class GroupQuantized:
    """A weight of shape (N, K) as codes on a grid, G groups to a row.

    Attributes:
        codes: (N, K) in the grid's `code_dtype`, one code an element.
        scale: (N, G) in the grid's `scale_dtype`.
        zero: (N, G); `scale_dtype` for a float zero, uint8 for an integer one, None for none.
        grid: the grid of the codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid

    @property
    def shape(self) -> torch.Size:
        """Return (N, K)."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (N, K), computed in float32 and rounded once to `dtype`."""
        rows, width = self.codes.shape
        codes = in_groups(self.codes, self.grid).float()
        scale = self.scale.float().unsqueeze(-1)
        if self.zero is None:
            weight = codes * scale
        elif self.grid.zero == "float":
            weight = codes * scale + self.zero.float().unsqueeze(-1)
        else:
            weight = (codes - self.zero.float().unsqueeze(-1)) * scale
        return weight.view(rows, width).to(dtype)

    def rows(self, first: int, stop: int) -> GroupQuantized:
        """Return the rows from `first` to `stop`."""
        zero = None if self.zero is None else self.zero[first:stop]
        return GroupQuantized(self.codes[first:stop], self.scale[first:stop], zero, self.grid)

    def with_float_zero(self) -> GroupQuantized:
        """Return the same weight with signed codes and float zeros; zeros that were integers are rounded once."""
        grid = replace(self.grid, zero="float", positive=False)
        if self.zero is None:
            return GroupQuantized(self.codes, self.scale, torch.zeros_like(self.scale), grid)
        if self.grid.zero == "float":
            return self
        zero = (-grid.lowest - self.zero.float()) * self.scale.float()
        return GroupQuantized((self.codes + grid.lowest).view(torch.int8), self.scale, zero.to(grid.scale_dtype), grid)

    def from_float_zero(self, grid: Grid) -> GroupQuantized:
        """Return the weight on `grid` that `with_float_zero` changed to this one."""
        if grid.zero == "none":
            return GroupQuantized(self.codes, self.scale, None, grid)
        if grid.zero == "float":
            return self
        assert self.zero is not None, "it has float zeros"
        zero = (-self.grid.lowest - self.zero.float() / self.scale.float()).round_().to(torch.uint8)
        return GroupQuantized((self.codes - self.grid.lowest).view(torch.uint8), self.scale, zero, grid)

    def reordered(self, order: Callable[[torch.Tensor], torch.Tensor]) -> GroupQuantized:
        """Return the rows in the order that `order` gives to the rows of any tensor."""
        zero = None if self.zero is None else order(self.zero)
        return GroupQuantized(order(self.codes), order(self.scale), zero, self.grid)

    def to(self, device: torch.device | str) -> GroupQuantized:
        """Return the same weight on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return GroupQuantized(self.codes.to(device), self.scale.to(device), zero, self.grid)


def joined(parts: Sequence[GroupQuantized]) -> GroupQuantized:
    """Return the rows of weights on one grid, one part after the other."""
    zeros = [part.zero for part in parts if part.zero is not None]
    return GroupQuantized(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].grid,
    )


def in_groups(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """View a weight (N, K) as groups (N, G, K / G)."""
    rows, width = weight.shape
    size = grid.group(width)
    return weight.reshape(rows, width // size, size)


def offsets(scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Return the value of a code of 0 in each group, (N, G) float32."""
    if zero is None:
        return torch.zeros_like(scale, dtype=torch.float32)
    return zero.float() if grid.zero == "float" else -zero.float() * scale.float()


def choose_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Return the nearest code of every element, as whole numbers in float32.

    Args:
        groups: (N, G, g) weights, any float type.
        scale, zero: (N, G) as they will be stored, so already in `grid.scale_dtype`. The codes of a scale 0 are 0.
    """
    if grid.values == "e4m3":
        return grid.nearest(groups.float() / scale.float().unsqueeze(-1))  # divided, as torchao does
    inverse = torch.where(scale == 0, 0, 1.0 / scale.float()).unsqueeze(-1)
    if grid.zero == "float" and zero is not None:
        codes = (groups.float() - zero.float().unsqueeze(-1)).mul_(inverse)
    else:
        codes = groups.float() * inverse
    if grid.zero == "integer" and zero is not None:
        return codes.round_().add_(zero.float().unsqueeze(-1)).clamp_(grid.lowest, grid.highest)
    return grid.nearest(codes)


def assemble(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> GroupQuantized:
    """Put grouped weights (N, G, g) on the grid with the given scales and zeros, in their stored dtype."""
    if grid.super_block is not None:
        scale, zero = grid.stored(scale, zero)
    codes = choose_codes(groups, scale, zero, grid).to(grid.code_dtype)
    return GroupQuantized(codes.flatten(1), scale, zero, grid)
