"""Half-quadratic quantization (Badri and Shaji, 2023): no data, a few cheap iterations.

The error W - dequantize(W) is modelled as sparse (an l_p norm with p < 1): outliers
may be far off, the bulk may not. Half-quadratic splitting alternates between the
sparse error, found by soft shrinkage, and the zero points, found in closed form.
https://mobiusml.github.io/hqq_blog/
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import Grid, GroupQuantized, assemble, choose_codes, in_groups
from pipeline.quantization.rounding.rtn import full_range

P = 0.7
BETA = 10.0
KAPPA = 1.01
ITERATIONS = 20


def round_weight(weight: torch.Tensor, grid: Grid) -> GroupQuantized:
    """Put a weight (N, K) on a grid with a float zero. Rows do not influence each other.

    Zeros are rounded to the grid's `scale_dtype` in every iteration, and each group
    keeps the best zero it met, so that what is optimised is what will be stored.
    """
    if grid.zero != "float":
        raise ValueError(f"hqq moves float zeros; the grid has zero={grid.zero!r}")
    groups = in_groups(weight, grid).float()
    scale, zero = full_range(groups, grid)
    step = scale.float().unsqueeze(-1)
    best_zero, best_error = zero, torch.full(zero.shape, torch.inf, device=zero.device)
    beta = BETA
    for _ in range(ITERATIONS):
        on_grid = choose_codes(groups, scale, zero, grid).mul_(step)
        error = (groups - on_grid).sub_(zero.float().unsqueeze(-1))
        distance = error.abs()
        size = distance.mean(dim=-1)
        better = size < best_error  # no early end: it would let rows of a block decide for each other
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, size, best_error)
        sparse = _shrink(error, distance, beta)
        zero = torch.sub(groups, sparse, out=sparse).sub_(on_grid).mean(dim=-1).to(grid.scale_dtype)
        beta *= KAPPA
    return assemble(groups, scale, best_zero, grid)


def _shrink(error: torch.Tensor, distance: torch.Tensor, beta: float) -> torch.Tensor:
    """The l_p shrinkage, sign(e) * max(|e| - |e|^(p - 1) / beta, 0), in the place of `error`; `distance` is |e|."""
    less = distance.clamp(min=1e-8).pow_(P - 1).div_(beta)
    return error.sign_().mul_(torch.sub(distance, less, out=less).clamp_(min=0))
