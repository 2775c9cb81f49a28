"""Round to nearest: the range of each group, cut into equal steps. No data, no search.

With zero "none" and one scale per row this is torchao's `Int8WeightOnlyConfig`, bit
for bit; with a float zero it is the affine grid of torchao's `Int4Tensor`.
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import SMALLEST_STEP, Grid, GroupQuantized, assemble, in_groups
from pipeline.quantization.statistics import Statistics


def round(rows: torch.Tensor, grid: Grid, statistics: Statistics | None = None) -> GroupQuantized:
    """Put rows (N, K) of a weight on `grid`. Rows do not influence each other."""
    groups = in_groups(rows, grid)
    scale, zero = full_range(groups, grid)
    return assemble(groups, scale, zero, grid)


def full_range(groups: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales and zeros (N, G) that clip no weight of (N, G, g)."""
    if grid.zero == "none":
        # In the weight's own type, as torchao does, so that the codes agree to the last bit.
        # The largest is found in float32 where that is exact, because it is faster.
        wide = groups.float() if groups.dtype.itemsize == 2 else groups
        largest = wide.abs().amax(dim=-1).to(groups.dtype)
        scale = (largest / _as_tensor((grid.highest - grid.lowest) / 2, largest)).clamp(min=SMALLEST_STEP)
        return scale.to(grid.scale_dtype), None
    groups = groups.float()
    lowest, highest = groups.amin(dim=-1), groups.amax(dim=-1)  # torch.aminmax is ten times slower along a dimension
    steps = _as_tensor(grid.highest - grid.lowest, groups)
    if grid.zero == "float":
        if grid.super_block is not None:  # whose zeros are never positive
            lowest = lowest.clamp(max=0)
        # Divided first, because the difference of two large numbers may be infinite.
        scale = (highest / steps - lowest / steps).clamp(min=SMALLEST_STEP).to(grid.scale_dtype)
        zero = (lowest - grid.lowest * scale.float()).to(grid.scale_dtype)
        return scale, zero
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)  # zero itself must be a code
    scale = (highest / steps - lowest / steps).clamp(min=SMALLEST_STEP).to(grid.scale_dtype)
    zero = (-lowest / scale.float()).round().clamp(grid.lowest, grid.highest).to(torch.uint8)
    return scale, zero


def _as_tensor(number: float, beside: torch.Tensor) -> torch.Tensor:
    """Return a number as a tensor on the device of another one. CUDA multiplies by the rounded inverse of a number."""
    return torch.tensor(number, dtype=beside.dtype, device=beside.device)
