"""Grids, and random weights rounded to them."""

from __future__ import annotations

import torch

from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.roundings import rounding


def int4(group_size: int = 32) -> Grid:
    return Grid(4, group_size, "float", torch.bfloat16)


def int8(group_size: int = 32) -> Grid:
    return Grid(8, group_size, "none", torch.float32)


def weight_on_grid(grid: Grid, rows: int, width: int) -> GroupQuantized:
    generator = torch.Generator().manual_seed(rows * width)
    return rounding("rtn").round(torch.randn(rows, width, generator=generator).bfloat16() * 0.1, grid)
