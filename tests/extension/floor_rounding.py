"""A rounding from one file: every code is the next lower one, within the full range of its group."""

from __future__ import annotations

from pipeline.config import catalog

NAME = "floor"


def register(needs: catalog.Need = catalog.Need.NOTHING) -> None:
    """Add the rounding; every variant that it can fill offers it."""
    catalog.register(catalog.Rounding(NAME, __name__, ("none", "float"), "rounded down", needs, needs))


def round(rows, grid, statistics=None):
    from pipeline.quantization.grid import in_groups
    from pipeline.quantization.roundings.rtn import full_range

    groups = in_groups(rows, grid).float()
    scale, zero = full_range(in_groups(rows, grid), grid)
    codes = groups - zero.float().unsqueeze(-1) if zero is not None else groups
    codes = (codes / scale.float().unsqueeze(-1)).floor().clamp(grid.lowest, grid.highest)
    return grid_of(codes, scale, zero, grid)


def grid_of(codes, scale, zero, grid):
    import torch

    from pipeline.quantization.grid import GroupQuantized

    return GroupQuantized(codes.to(torch.int8 if grid.signed else torch.uint8).flatten(1), scale, zero, grid)
