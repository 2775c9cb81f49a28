"""Half-quadratic quantization (Badri and Shaji, 2023): no data, a few cheap iterations.

The error W - dequantize(W) is modelled as sparse (an l_p norm with p < 1): outliers
may be far off, the bulk may not. Half-quadratic splitting alternates between the
sparse error, found by soft shrinkage, and the zero points, found in closed form.
https://mobiusml.github.io/hqq_blog/
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import SMALLEST_STEP, Grid, GroupQuantized, assemble, choose_codes, in_groups
from pipeline.quantization.roundings.rtn import full_range
from pipeline.quantization.statistics import Statistics

P = 0.7
BETA = 10.0
KAPPA = 1.01
ITERATIONS = 20


def round(rows: torch.Tensor, grid: Grid, statistics: Statistics | None = None) -> GroupQuantized:
    """Put rows (N, K) of a weight on a grid with a float zero, or with none. Rows do not influence each other.

    A grid without zeros gets fitted scales instead. Every iteration rounds the fitted value as it will be stored.
    Each group keeps its best value, so the stored values are those that were optimised.
    """
    if grid.zero == "none":
        return _without_zero(rows, grid)
    if grid.zero != "float":
        raise ValueError(f"hqq moves float zeros or scales; the grid has zero={grid.zero!r}")
    groups = in_groups(rows, grid).float()
    scale, zero = full_range(groups, grid)
    assert zero is not None, "the grid has float zeros"
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


def _without_zero(weight: torch.Tensor, grid: Grid) -> GroupQuantized:
    """Fit scales in closed form: each brings the codes closest to W - sparse."""
    groups = in_groups(weight, grid)
    scale, _ = full_range(groups, grid)
    groups = groups.float()
    best_scale, best_error = scale, torch.full(scale.shape, torch.inf, device=scale.device)
    beta = BETA
    for _ in range(ITERATIONS):
        codes = choose_codes(groups, scale, None, grid)
        error = torch.addcmul(groups, codes, scale.float().unsqueeze(-1), value=-1)
        distance = error.abs()
        size = distance.mean(dim=-1)
        better = size < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, size, best_error)
        dense = groups - _shrink(error, distance, beta)
        fitted = (codes * dense).sum(dim=-1) / codes.square().sum(dim=-1).clamp(min=1)
        # In the weight's own type first, as torchao computes with it.
        scale = fitted.clamp(min=SMALLEST_STEP).to(weight.dtype).to(grid.scale_dtype)
        beta *= KAPPA
    return assemble(groups, best_scale, None, grid)


def _shrink(error: torch.Tensor, distance: torch.Tensor, beta: float) -> torch.Tensor:
    """Overwrite `error` with its l_p shrinkage, sign(e) * max(|e| - |e|^(p - 1) / beta, 0); `distance` is |e|."""
    less = distance.clamp(min=1e-8).pow_(P - 1).div_(beta)
    return error.sign_().mul_(torch.sub(distance, less, out=less).clamp_(min=0))
