"""Least squares: the scale and zero with the smallest squared error in each group. No data.

Rounding to nearest spends the codes on the two outermost weights of a group. Here a few
narrower ranges are tried. From each of them, linear regression of the weights on their codes
gives a scale and a zero, alternating with the choice of codes. Each group keeps its best result,
so its error is never larger than with the full range.
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import Grid, GroupQuantized, assemble, choose_codes, in_groups
from pipeline.quantization.roundings.rtn import SMALLEST_STEP, full_range
from pipeline.quantization.statistics import Statistics

NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the full range
FITS = 4  # from each of them


def round(rows: torch.Tensor, grid: Grid, statistics: Statistics | None = None) -> GroupQuantized:
    """Put rows (N, K) of a weight on a grid with a float zero, or with none. Rows do not influence each other.

    Scales and zeros are rounded to the grid's `scale_dtype` before candidates are compared,
    so the comparison uses the values that would be stored.
    """
    if grid.zero == "none":
        return _without_zero(rows, grid)
    if grid.zero != "float":
        raise ValueError(f"search fits float zeros or scales; the grid has zero={grid.zero!r}")
    groups = in_groups(rows, grid).float()
    full, _ = full_range(groups, grid)
    lowest, highest = torch.aminmax(groups, dim=-1)
    middle_code = (grid.lowest + grid.highest) / 2
    mean = groups.mean(dim=-1, keepdim=True)
    centred = groups - mean
    best = _Best(groups, grid)
    for share in NARROWER:
        scale = (full.float() * share).clamp(min=SMALLEST_STEP).to(grid.scale_dtype)
        zero = ((lowest + highest) / 2 - middle_code * scale.float()).to(grid.scale_dtype)
        codes = best.consider(scale, zero)
        for _ in range(FITS):
            codes = best.consider(*_fit(mean, centred, codes, grid))
    return assemble(groups, best.scale, best.zero, grid)


def _without_zero(weight: torch.Tensor, grid: Grid) -> GroupQuantized:
    """Fit scales without zeros. A scale may be negative, so that the outermost weight gets the lowest code.

    There is one more code below zero than above it.
    """
    groups = in_groups(weight, grid).float()
    lowest, highest = torch.aminmax(groups, dim=-1)
    full = torch.where(-lowest > highest, lowest, highest) / grid.lowest
    best = _Best(groups, grid)
    best.consider(*full_range(groups, grid))
    for share in NARROWER:
        codes = best.consider(_no_step_of_zero(full * share).to(grid.scale_dtype), None)
        for _ in range(FITS):
            fitted = (codes * groups).sum(dim=-1) / codes.square_().sum(dim=-1).clamp(min=1)
            codes = best.consider(_no_step_of_zero(fitted).to(grid.scale_dtype), None)
    return assemble(groups, best.scale, None, grid)


def _no_step_of_zero(scale: torch.Tensor) -> torch.Tensor:
    return scale.abs().clamp(min=SMALLEST_STEP).copysign(scale)


class _Best:
    """The scale and zero (N, G) with the smallest squared error so far, group by group."""

    def __init__(self, groups: torch.Tensor, grid: Grid):
        self.groups, self.grid = groups, grid
        self.scale, self.error = groups.new_empty(0), groups.new_empty(0)
        self.zero: torch.Tensor | None = None

    def consider(self, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Keep a candidate in the groups that it improves, and return its codes (N, G, g)."""
        codes = choose_codes(self.groups, scale, zero, self.grid)
        on_grid = codes * scale.float().unsqueeze(-1)
        if zero is not None:
            on_grid.add_(zero.float().unsqueeze(-1))
        error = on_grid.sub_(self.groups).square_().sum(dim=-1)
        if not len(self.error):
            self.scale, self.zero, self.error = scale, zero, error
        else:
            better = error < self.error
            self.scale = torch.where(better, scale, self.scale)
            self.zero = None if zero is None or self.zero is None else torch.where(better, zero, self.zero)
            self.error = torch.where(better, error, self.error)
        return codes


def _fit(
    mean: torch.Tensor, centred: torch.Tensor, codes: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros (N, G) from the regression of the weights on their codes, group by group.

    Args:
        mean: of the weights, (N, G, 1).
        centred: the weights (N, G, g) less their mean.
        codes: (N, G, g); they are overwritten.
    """
    mean_code = codes.mean(dim=-1, keepdim=True)
    spread = codes.sub_(mean_code)
    covariance = (spread * centred).sum(dim=-1)
    variance = spread.square_().sum(dim=-1)
    scale = (covariance / variance.clamp(min=0.5)).clamp(min=SMALLEST_STEP).to(grid.scale_dtype)
    zero = (mean.squeeze(-1) - scale.float() * mean_code.squeeze(-1)).to(grid.scale_dtype)
    return scale, zero
