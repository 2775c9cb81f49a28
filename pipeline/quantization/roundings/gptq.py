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

from pipeline.quantization.grid import Grid, GroupQuantized, in_groups, offsets
from pipeline.quantization.roundings import search
from pipeline.quantization.statistics import Statistics

DAMPING = 0.1  # of the mean diagonal of H; on text of another kind it loses less than 0.01
FITTED_AT_ONCE = 4_000_000  # numbers in the equations of the rows that are fitted together
FEWEST_FITTED = 32  # rows; with fewer, reading the Gram matrix again and again would take most of the time
COMPARED_AT_ONCE = 512  # rows
RIDGE = 1e-3  # how firmly a new scale or zero is held to the old one, relative to its own curvature


def round(rows: torch.Tensor, grid: Grid, statistics: Statistics | None = None) -> GroupQuantized:
    """Put rows (N, K) of a weight on a grid with any kind of zero.

    Raises:
        ValueError: if there is no Gram matrix.
    """
    if statistics is None or statistics.gram is None:
        raise ValueError("gptq needs the gram matrix of the layer's inputs")
    gram = statistics.gram
    damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    weight = rows.float()
    scale, zero, codes = _in_order(weight, grid, _factor(gram, damping))
    made = GroupQuantized(codes.to(grid.code_dtype), scale, zero, grid)
    del codes
    damped = gram.clone()
    damped.diagonal().add_(damping)
    return polish(weight, made, damped)


def _factor(gram: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Return the upper U with inverse(H) = U' U, from one Cholesky factor of the damped H with reversed order."""
    upper = gram.flip(0, 1)
    upper.diagonal().add_(damping)
    upper = torch.linalg.cholesky(upper)
    upper = upper.flip(0, 1)
    inverse = torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)


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
    scale, zero = weight.new_empty(0), None
    together = 1 if grid.super_block is None else grid.super_block.groups  # whose scales depend on each other
    for first in range(0, width, step):
        stop = min(first + step, width)
        if first % (size * together) == 0:
            end = first + size * together
            groups = columns[first:end].T.reshape(rows, together, size).contiguous()
            importance = upper.diagonal()[first:end].square().reciprocal().view(1, together, size)
            scale, zero = search.fit(groups, grid, importance)
            scales.append(scale)
            if zero is not None:
                zeros.append(zero)
        if first % size == 0:
            wide = scale[:, first // size % together].float()
            offset = offsets(scale, zero, grid)[:, first // size % together]
            inverse = torch.where(wide == 0, 0, 1 / wide)
        errors = columns.new_empty(stop - first, rows)
        for j in range(first, stop):
            column, code = columns[j], codes[j]
            grid.nearest(torch.mul(column - offset, inverse, out=code))
            error = torch.sub(column, (code * wide).add_(offset), out=errors[j - first]).div_(upper[j, j])
            columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(upper[first:stop, stop:].T, errors, alpha=-1)
    return torch.cat(scales, 1), torch.cat(zeros, 1) if zeros else None, codes.T.contiguous()


def polish(weight: torch.Tensor, made: GroupQuantized, gram: torch.Tensor, rounds: int = 2) -> GroupQuantized:
    """Return better scales, zeros and codes for the layer's squared output error; no row is worse than before."""
    target = weight @ gram
    better = _fit_all(target, made, gram)
    for _ in range(rounds):
        better = _fit_all(target, _descend(weight, better, gram), gram)
    improved = loss(weight, better, gram) < loss(weight, made, gram)  # a NaN is no improvement
    return _choose(improved, better, made)


def loss(weight: torch.Tensor, made: GroupQuantized, gram: torch.Tensor) -> torch.Tensor:
    """Return the squared output error of every row, (N,)."""
    found = []
    for first in range(0, len(weight), COMPARED_AT_ONCE):
        stop = min(first + COMPARED_AT_ONCE, len(weight))
        change = made.rows(first, stop).dequantize() - weight[first:stop]
        found.append((change @ gram).mul_(change).sum(1))
    return torch.cat(found)


def _fit_all(target: torch.Tensor, made: GroupQuantized, gram: torch.Tensor) -> GroupQuantized:
    """Fit all scales and float zeros of a row at once, in closed form, for fixed codes; rows that lose stay.

    Args:
        target: the weight times the Gram matrix, (N, K).
    """
    rows, width = target.shape
    groups = made.scale.shape[1]
    between = gram.view(width, groups, width // groups).sum(2)  # (K, G)
    unknowns = 2 * groups if made.grid.zero == "float" else groups
    step = max(FEWEST_FITTED, FITTED_AT_ONCE // (unknowns * unknowns + 2 * width))
    spans = ((first, min(first + step, rows)) for first in range(0, rows, step))
    fitted = [_fit_rows(target[first:stop], made.rows(first, stop), gram, between) for first, stop in spans]
    zero = torch.cat([zero for _, zero in fitted if zero is not None]) if made.grid.zero == "float" else made.zero
    return GroupQuantized(made.codes, torch.cat([scale for scale, _ in fitted]), zero, made.grid)


def _fit_rows(
    target: torch.Tensor, made: GroupQuantized, gram: torch.Tensor, between: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and float zeros (n, G) of some rows.

    Args:
        between: the sums (K, G) of H over the columns of each group.
    """
    rows, width = target.shape
    groups = made.scale.shape[1]
    size = width // groups
    codes = made.codes.float()
    zero = made.zero if made.grid.zero == "float" else None
    if made.zero is not None and zero is None:  # integers, which stay
        in_groups(codes, made.grid).sub_(made.zero.unsqueeze(-1))
    parts, old = [target * codes], [made.scale.float()]
    unknowns = groups if zero is None else 2 * groups
    normal = codes.new_zeros(rows, unknowns, unknowns)  # only the lower triangle is filled
    for g in range(groups):
        seen = codes[:, g * size : (g + 1) * size] @ gram[g * size : (g + 1) * size, g * size :]
        normal[:, g:groups, g] = seen.mul_(codes[:, g * size :]).view(rows, -1, size).sum(-1)
    if zero is not None:
        by_group = codes.view(rows, groups, size).transpose(0, 1)
        normal[:, groups:, :groups] = (by_group @ between.view(groups, size, groups)).permute(1, 2, 0)
        normal[:, groups:, groups:] = between.view(groups, size, groups).sum(1).tril()
        parts.append(target)
        old.append(zero.float())
    wanted = torch.cat([part.view(rows, groups, size).sum(-1) for part in parts], 1).unsqueeze(2)
    before = torch.cat(old, 1).unsqueeze(2)
    normal += normal.tril(-1).mT
    slope = normal @ before - wanted  # half the gradient of the error
    held = normal.clone()
    diagonal = held.diagonal(dim1=1, dim2=2)
    diagonal += diagonal * RIDGE + torch.finfo(torch.float32).tiny
    solved, _ = torch.linalg.solve_ex(held, slope)
    stored = _stored(before - solved, before, slope, normal, made.grid)
    moved = stored.float() - before
    improved = ((2 * slope + normal @ moved) * moved).sum(1) < 0  # (n, 1); a NaN is no improvement
    if made.grid.positive:
        improved &= (stored[:, :groups] > 0).all(1)
    scale = torch.where(improved, stored[:, :groups, 0], made.scale)
    return scale, None if zero is None else torch.where(improved, stored[:, groups:, 0], zero)


def _stored(
    wanted: torch.Tensor, before: torch.Tensor, slope: torch.Tensor, normal: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return scales, then zeros, (n, U, 1) as they will be stored, near to those with the least error.

    If they are integers times one number, each integer is chosen again, given all others, in one pass.

    Args:
        wanted: those with the least error.
        slope: half the gradient of the error at `before`.
        normal: half its second derivatives, (n, U, U).
    """
    if grid.super_block is None:
        return wanted.to(grid.scale_dtype)
    of, count = grid.super_block, wanted.shape[1]
    parts = wanted.squeeze(2).chunk(1 if grid.zero == "none" else 2, 1)
    stored = grid.stored(parts[0], parts[1] if len(parts) == 2 else None)
    made = torch.cat([part for part in stored if part is not None], 1)
    number, integers = of.split(made)
    step, integers = number.float().repeat_interleave(of.groups, 1), integers.view(made.shape).clone()
    lowest = 0 if len(parts) == 2 else 1 - of.highest
    slope = (slope + normal @ (made.unsqueeze(2) - before)).squeeze(2)
    for j in range(count):
        sign = -1 if len(parts) == 2 and j >= count // 2 else 1  # no zero is positive
        better = integers[:, j] - slope[:, j] / (normal[:, j, j] * step[:, j])
        better = (better * sign).round_().clamp_(lowest, of.highest - 1).mul_(sign)
        # The largest integer of a super-block stays, because the number is told by it.
        is_free = (integers[:, j].abs() < of.highest) & (step[:, j] > 0) & (normal[:, j, j] > 0)
        moved = torch.where(is_free, better - integers[:, j], 0)
        integers[:, j] += moved
        slope += normal[:, :, j] * (moved * step[:, j]).unsqueeze(1)
    return (integers * step).unsqueeze(2)


def _descend(weight: torch.Tensor, made: GroupQuantized, gram: torch.Tensor) -> GroupQuantized:
    """Choose each code again, given all others, in one pass over the columns; no choice makes a row worse."""
    grid = made.grid
    rows, width = weight.shape
    size = grid.group(width)
    step = min(size, 128)
    codes = made.codes.T.float().contiguous()  # (K, N)
    change, scales = codes.clone(), made.scale.T.float().unsqueeze(1)
    change.view(-1, size, rows).mul_(scales)
    if made.zero is not None:
        change.view(-1, size, rows).add_(offsets(made.scale, made.zero, grid).T.unsqueeze(1))
    change -= weight.T
    diagonal = gram.diagonal()
    for first in range(0, width, step):
        stop = min(first + step, width)
        slope = gram[first:stop] @ change  # (n, N), half the gradient
        scale = made.scale[:, first // size].float()
        inverse = torch.where(scale == 0, 0, 1 / scale)
        for j in range(first, stop):
            wanted = codes[j] - slope[j - first].div(diagonal[j]).mul_(inverse)
            moved = grid.nearest(wanted).sub_(codes[j])
            codes[j] += moved
            moved *= scale
            change[j] += moved
            slope[j - first + 1 :].addr_(gram[j + 1 : stop, j], moved)
    return GroupQuantized(codes.T.contiguous().to(made.codes.dtype), made.scale, made.zero, grid)


def _choose(improved: torch.Tensor, new: GroupQuantized, old: GroupQuantized) -> GroupQuantized:
    """Return the new values of the rows (N,) that they improve."""
    at = improved.unsqueeze(1)
    zero = None if old.zero is None or new.zero is None else torch.where(at, new.zero, old.zero)
    return GroupQuantized(torch.where(at, new.codes, old.codes), torch.where(at, new.scale, old.scale), zero, old.grid)
