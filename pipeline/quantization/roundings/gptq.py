"""GPTQ (Frantar et al., 2022): the error of a column is made up for by the columns after it.

https://arxiv.org/abs/2210.17323
The layer's squared output error over calibration text is tr(D H D'), with D the change of the weight and H the Gram
matrix of the inputs. Columns are rounded in order, and later ones move to where they cancel most of the error so far.
Columns keep their order, so that any format with groups of neighbouring columns can store the result.

Scales and zeros of a group are fitted when the loop reaches it, on the weights as moved so far, by a search that is
weighted with each column's own part of the error. At the end the codes stay, all scales and zeros of a row follow in
closed form, codes are improved one after the other, and the scales are fitted again (`polish`).
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.roundings import search
from pipeline.quantization.statistics import Statistics

DAMPING = 0.1  # of the mean diagonal of H; on text of another kind it loses less than 0.01
RIDGE = 1e-3  # how firmly a new scale or zero is held to the old one, relative to its own curvature


def round(rows: torch.Tensor, grid: Grid, statistics: Statistics | None = None) -> GroupQuantized:
    """Put rows (N, K) of a weight on a grid with a float zero, or with none.

    Raises:
        ValueError: if there is no Gram matrix, or if the grid has integer zeros.
    """
    if statistics is None or statistics.gram is None:
        raise ValueError("gptq needs the gram matrix of the layer's inputs")
    damped = statistics.gram.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    weight = rows.float()
    scale, zero, codes = _in_order(weight, grid, _factor(damped))
    return polish(
        weight, GroupQuantized(codes.to(torch.int8 if grid.signed else torch.uint8), scale, zero, grid), damped
    )


def _factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the upper U with inverse(H) = U' U, from one Cholesky factor of H with reversed rows and columns."""
    lower = torch.linalg.cholesky(gram.flip(0, 1))
    return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(gram)), upper=True)


def _in_order(
    weight: torch.Tensor, grid: Grid, upper: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Round column after column; return scales and zeros (N, G), and codes (N, K) in float32."""
    rows, width = weight.shape
    size = grid.group(width)
    step = min(size, 128)  # columns between updates of all later ones
    columns = weight.T.contiguous()  # (K, N), a column is contiguous
    codes = torch.empty_like(columns)
    scales, zeros = [], []
    scale = zero = None
    for first in range(0, width, step):
        stop = min(first + step, width)
        if first % size == 0:
            group = columns[first : first + size].T.unsqueeze(1).contiguous()  # (N, 1, g)
            importance = upper.diagonal()[first : first + size].square().reciprocal().reshape(1, 1, -1)
            scale, zero = search.fit(group, grid, importance)
            scales.append(scale)
            if zero is not None:
                zeros.append(zero)
            wide = scale.float().squeeze(1)
            offset = torch.zeros_like(wide) if zero is None else zero.float().squeeze(1)
            inverse = 1 / wide
        errors = torch.empty(stop - first, rows)
        for j in range(first, stop):
            column = columns[j]
            code = ((column - offset) * inverse).round_().clamp_(grid.lowest, grid.highest)
            codes[j] = code
            error = errors[j - first] = (column - (code * wide + offset)) / upper[j, j]
            columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(upper[first:stop, stop:].T, errors, alpha=-1)
    return torch.cat(scales, 1), torch.cat(zeros, 1) if zeros else None, codes.T.contiguous()


def polish(weight: torch.Tensor, made: GroupQuantized, gram: torch.Tensor, rounds: int = 2) -> GroupQuantized:
    """Return better scales, zeros and codes for the layer's squared output error; none is worse than before."""
    made = _fit_all(weight, made, gram)
    for _ in range(rounds):
        made = _fit_all(weight, _descend(weight, made, gram), gram)
    return made


def loss(weight: torch.Tensor, made: GroupQuantized, gram: torch.Tensor) -> torch.Tensor:
    """Return the squared output error of every row, (N,)."""
    change = made.dequantize() - weight
    return ((change @ gram) * change).sum(1)


def _fit_all(weight: torch.Tensor, made: GroupQuantized, gram: torch.Tensor) -> GroupQuantized:
    """Fit all scales and zeros of a row at once, in closed form, for fixed codes; rows that lose by rounding stay."""
    grid = made.grid
    rows, width = weight.shape
    size = grid.group(width)
    groups = width // size
    codes = made.codes.float()
    zeros = made.zero
    unknowns = groups * (1 if zeros is None else 2)
    normal = torch.empty(rows, unknowns, unknowns)
    for g in range(groups):
        span = slice(g * size, (g + 1) * size)
        seen = codes[:, span] @ gram[span]  # (N, K)
        normal[:, g, :groups] = (seen * codes).view(rows, groups, size).sum(-1)
        if zeros is not None:
            ones = seen.view(rows, groups, size).sum(-1)
            normal[:, g, groups:] = ones
            normal[:, groups:, g] = ones
    target = weight @ gram
    right = [(target * codes).view(rows, groups, size).sum(-1)]
    old = [made.scale.float()]
    if zeros is not None:
        normal[:, groups:, groups:] = gram.view(groups, size, groups, size).sum((1, 3))
        right.append(target.view(rows, groups, size).sum(-1))
        old.append(zeros.float())
    b, before = torch.cat(right, 1), torch.cat(old, 1)
    ridge = normal.diagonal(dim1=1, dim2=2) * RIDGE + torch.finfo(torch.float32).tiny
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    solved, _ = torch.linalg.solve_ex(normal, b + ridge * before)
    scale = solved[:, :groups].to(grid.scale_dtype)
    zero = solved[:, groups:].to(grid.scale_dtype) if zeros is not None else None
    return _better(weight, made, GroupQuantized(made.codes, scale, zero, grid), gram)


def _descend(weight: torch.Tensor, made: GroupQuantized, gram: torch.Tensor) -> GroupQuantized:
    """Choose each code anew, given all others, in one pass over the columns."""
    grid = made.grid
    rows, width = weight.shape
    size = grid.group(width)
    step = min(size, 128)
    change = (made.dequantize() - weight).T.contiguous()  # (K, N)
    codes = made.codes.float().T.contiguous()
    diagonal = gram.diagonal()
    for first in range(0, width, step):
        stop = min(first + step, width)
        slope = gram[first:stop] @ change  # (n, N), half the gradient
        scale = made.scale[:, first // size].float()
        inverse = torch.where(scale == 0, 0, 1 / scale)
        for j in range(first, stop):
            wanted = codes[j] - slope[j - first] / diagonal[j] * inverse
            code = wanted.round_().clamp_(grid.lowest, grid.highest)
            moved = (code - codes[j]) * scale
            codes[j] = code
            change[j] += moved
            slope[j - first + 1 :].addr_(gram[j + 1 : stop, j], moved)
    better = GroupQuantized(codes.T.contiguous().to(made.codes.dtype), made.scale, made.zero, grid)
    return _better(weight, made, better, gram)


def _better(weight: torch.Tensor, old: GroupQuantized, new: GroupQuantized, gram: torch.Tensor) -> GroupQuantized:
    """Return the new values of the rows that they improve."""
    improved = (loss(weight, new, gram) < loss(weight, old, gram)).unsqueeze(1)  # a NaN is no improvement
    zero = None if old.zero is None or new.zero is None else torch.where(improved, new.zero, old.zero)
    scale = torch.where(improved, new.scale, old.scale)
    return GroupQuantized(torch.where(improved, new.codes, old.codes), scale, zero, old.grid)
