"""Scales of super-blocks: least squares for groups whose scales are integers times one number.

Each group has a squared error that is quadratic in its scale and zero, for fixed codes. So scales are fitted for given
zeros and zeros for given scales, each rounded to integers, and the number of a super-block follows in closed form.
That alternates with the choice of codes, and each super-block keeps its best result.
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import Grid, SuperBlock, choose_codes

FITS = 5
SWEEPS = 2  # over scales and zeros, for the same codes


def fit(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales and zeros (N, G) as they can be stored, with a small weighted squared error.

    Args:
        groups: (N, G, g) float32.
        scale, zero: (N, G), fitted for each group alone.
        weights: (1, G, g) or (N, G, g), weights of the elements; None if all weigh the same.
    """
    of = grid.super_block
    assert of is not None, "the grid has super-blocks"
    weights = groups.new_ones(1, 1, 1) if weights is None else weights
    tiny = torch.finfo(torch.float32).tiny
    weight, wanted = weights.expand(*weights.shape[:-1], groups.shape[-1]).sum(-1), (groups * weights).sum(-1)
    scale, zero = grid.stored(scale, zero)
    best_scale, best_zero, least = scale, zero, None
    for number in range(FITS + 1):
        codes = choose_codes(groups, scale, zero, grid)
        change = codes * scale.unsqueeze(-1) - groups
        if zero is not None:
            change += zero.unsqueeze(-1)
        error = by_super_block(change.square_().mul_(weights).sum(-1), of)
        if least is None:
            least = error
        else:
            better = error < least  # a NaN is no improvement
            least = torch.where(better, error, least)
            better = better.repeat_interleave(of.groups, 1)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
        if number == FITS:
            break
        seen = codes * weights
        products, squares = (seen * groups).sum(-1), (seen * codes).sum(-1).clamp(min=tiny)
        if zero is None:
            scale = _stored(products, squares, of)
            continue
        sums = seen.sum(-1)
        free = (squares - sums.square() / weight).clamp(min=tiny)
        zero = ((wanted - sums * (products - sums * wanted / weight) / free) / weight).clamp(max=0)
        for _ in range(SWEEPS):
            scale = _stored(products - sums * zero, squares, of, signed=False)
            zero = -_stored(sums * scale - wanted, weight.expand_as(wanted), of, signed=False)
    return best_scale, best_zero


def by_super_block(values: torch.Tensor, of: SuperBlock) -> torch.Tensor:
    """Return the sums (N, S) of the values (N, G) of the groups of each super-block."""
    return values.view(len(values), -1, of.groups).sum(-1)


def _stored(products: torch.Tensor, squares: torch.Tensor, of: SuperBlock, signed: bool = True) -> torch.Tensor:
    """Return the values (N, G) that can be stored and have the least sum of `squares * v * v - 2 * products * v`."""
    values = products / squares
    number, integers = of.split(values if signed else values.clamp(min=0))
    integers = integers.view(values.shape)
    most = by_super_block(integers * products, of)
    least = by_super_block(integers.square() * squares, of)
    number = torch.where(least > 0, most / least, number.float()).to(of.dtype).float()
    return integers * number.repeat_interleave(of.groups, 1)
