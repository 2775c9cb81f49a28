"""Least squares: the scale and zero with the smallest squared error in each group.

Rounding to nearest spends the codes on the two outermost weights of a group. Here a few
narrower ranges are tried. From each of them, linear regression of the weights on their codes
gives a scale and a zero, alternating with the choice of codes. Each group keeps its best result,
so its error is never larger than with the full range.

With second moments of the layer's inputs, the error of each column is weighted with the mean square of its input, as
an importance matrix does: then the sum is the expected squared error of the layer's output, if inputs do not correlate.
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import SMALLEST_STEP, Grid, GroupQuantized, assemble, choose_codes, in_groups, offsets
from pipeline.quantization.roundings import super_blocks
from pipeline.quantization.roundings.rtn import full_range
from pipeline.quantization.statistics import Statistics

NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the full range
AROUND = tuple(share / 100 for share in range(70, 135, 5))  # of it, for groups whose scales are rounded once more
FITS = 4  # from each of them
LEAST_WEIGHT = 1e-3  # of the mean weight of a column


def round(rows: torch.Tensor, grid: Grid, statistics: Statistics | None = None) -> GroupQuantized:
    """Put rows (N, K) of a weight on a grid with any kind of zero. Rows do not influence each other.

    Scales and zeros are rounded to the grid's `scale_dtype` before candidates are compared,
    so the comparison uses the values that would be stored.

    Args:
        statistics: their second moments weight the columns; without them, all columns weigh the same.
    """
    groups = in_groups(rows, grid).float()
    weights = None
    if statistics is not None:
        weights = column_weights(statistics.second_moments).reshape(1, *groups.shape[1:])
    scale, zero = fit(groups, grid, weights)
    return assemble(groups, scale, zero, grid)


def column_weights(second_moments: torch.Tensor) -> torch.Tensor:
    """Return the weight of each column (K,). An input that was always zero still weighs a little."""
    return second_moments + LEAST_WEIGHT * second_moments.mean().clamp(min=torch.finfo(torch.float32).tiny)


def fit(
    groups: torch.Tensor, grid: Grid, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and zeros (N, G) with the smallest weighted squared error, as they will be stored.

    Args:
        groups: (N, G, g) float32.
        weights: (1, G, g) or (N, G, g), weights of the elements; None if all weigh the same.
    """
    found = _without_zero(groups, grid, weights) if grid.zero == "none" else _with_zero(groups, grid, weights)
    return found if grid.super_block is None else super_blocks.fit(groups, *found, grid, weights)


def _with_zero(
    groups: torch.Tensor, grid: Grid, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    full, _ = full_range(groups, grid)
    lowest, highest = torch.aminmax(groups, dim=-1)
    middle_code = (grid.lowest + grid.highest) / 2
    best = _Best(groups, grid, weights)
    if grid.zero == "integer":  # the centre of a range may be no multiple of its step
        best.consider(*full_range(groups, grid))
    mean = best.mean(groups)
    centred = groups - mean
    for share in _shares(grid):
        scale = (full.float() * share).clamp(min=SMALLEST_STEP).to(grid.scale_dtype)
        zero = (lowest + highest) / 2 - middle_code * scale.float()
        codes = best.consider(scale, _stored(zero, scale, grid))
        for _ in range(FITS):
            codes = best.consider(*_regression(mean, centred, codes, best))
    if grid.zero == "integer":
        _try_next_integers(best)
    return best.scale, best.zero


def _without_zero(groups: torch.Tensor, grid: Grid, weights: torch.Tensor | None) -> tuple[torch.Tensor, None]:
    """Fit scales without zeros.

    There is one more code below zero than above it. A scale may be negative, unless the grid forbids it, so that the
    outermost weight gets the lowest code.
    """
    lowest, highest = torch.aminmax(groups, dim=-1)
    if grid.positive:
        full = torch.maximum(lowest / grid.lowest, highest / grid.highest)
    else:
        full = torch.where(-lowest > highest, lowest, highest) / grid.lowest
    best = _Best(groups, grid, weights)
    best.consider(*full_range(groups, grid))
    for share in _shares(grid):
        codes = best.consider(_no_step_of_zero(full * share).to(grid.scale_dtype), None)
        for _ in range(FITS):
            products, squares = best.total(codes * groups), best.total(codes.square_())
            fitted = products / squares.clamp(min=best.least)
            codes = best.consider(_no_step_of_zero(fitted).to(grid.scale_dtype), None)
    return best.scale, None


def _shares(grid: Grid) -> tuple[float, ...]:
    """Return the shares of the full range that are tried."""
    return NARROWER if grid.super_block is None else AROUND


def _no_step_of_zero(scale: torch.Tensor) -> torch.Tensor:
    return scale.abs().clamp(min=SMALLEST_STEP).copysign(scale)


class _Best:
    """The scale and zero (N, G) with the smallest squared error so far, group by group."""

    def __init__(self, groups: torch.Tensor, grid: Grid, weights: torch.Tensor | None):
        self.groups, self.grid, self.weights = groups, grid, weights
        self.scale, self.error = groups.new_empty(0), groups.new_empty(0)
        self.zero: torch.Tensor | None = None
        # A sum of squared codes is at least 1, and that of squared distances at least 1/2, if codes differ at all.
        self.least = 1.0 if weights is None else weights.amin(dim=-1)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the weighted sums (N, G) of values (N, G, g)."""
        return (values if self.weights is None else values * self.weights).sum(dim=-1)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the weighted means (N, G, 1) of values (N, G, g)."""
        if self.weights is None:
            return values.mean(dim=-1, keepdim=True)
        return (self.total(values) / self.weights.sum(dim=-1)).unsqueeze(-1)

    def consider(self, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Keep a candidate in the groups that it improves, and return its codes (N, G, g)."""
        if zero is not None and self.grid.super_block is not None:  # whose zeros are never positive
            zero = zero.clamp(max=0)
        codes = choose_codes(self.groups, scale, zero, self.grid)
        on_grid = codes * scale.float().unsqueeze(-1)
        if zero is not None:
            on_grid.add_(offsets(scale, zero, self.grid).unsqueeze(-1))
        error = self.total(on_grid.sub_(self.groups).square_())
        if not len(self.error):
            self.scale, self.zero, self.error = scale, zero, error
        else:
            better = error < self.error
            self.scale = torch.where(better, scale, self.scale)
            self.zero = None if zero is None or self.zero is None else torch.where(better, zero, self.zero)
            self.error = torch.where(better, error, self.error)
        return codes


def _regression(
    mean: torch.Tensor, centred: torch.Tensor, codes: torch.Tensor, best: _Best
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zeros (N, G) from the regression of the weights on their codes, group by group.

    Args:
        mean: of the weights, (N, G, 1).
        centred: the weights (N, G, g) less their mean.
        codes: (N, G, g); they are overwritten.
    """
    mean_code = best.mean(codes)
    spread = codes.sub_(mean_code)
    covariance = best.total(spread * centred)
    variance = best.total(spread.square_())
    scale = (covariance / variance.clamp(min=best.least / 2)).clamp(min=SMALLEST_STEP).to(best.grid.scale_dtype)
    zero = mean.squeeze(-1) - scale.float() * mean_code.squeeze(-1)
    return scale, _stored(zero, scale, best.grid)


def _try_next_integers(best: _Best) -> None:
    """Fit the scale to the integer zero, which was rounded, and to the integers beside it."""
    for step in (0, -1, 1):
        assert best.zero is not None, "the grid has zeros"
        zero = (best.zero.float() + step).clamp_(best.grid.lowest, best.grid.highest).to(torch.uint8)
        codes = best.consider(best.scale, zero)
        for _ in range(2):
            from_zero = codes.sub_(zero.float().unsqueeze(-1))
            products, squares = best.total(from_zero * best.groups), best.total(from_zero.square_())
            scale = (products / squares.clamp(min=best.least)).clamp(min=SMALLEST_STEP)
            codes = best.consider(scale.to(best.grid.scale_dtype), zero)


def _stored(zero: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return values (N, G) of a code of 0 as zeros of the grid."""
    if grid.zero == "float":
        return zero.to(grid.scale_dtype)
    return (-zero / scale.float()).round_().clamp_(grid.lowest, grid.highest).to(torch.uint8)
