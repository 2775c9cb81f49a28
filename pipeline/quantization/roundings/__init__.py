"""Ways to put a weight on a grid: a module each, and a row each in `pipeline.config.catalog.ROUNDINGS`."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from pipeline.config.catalog import ROUNDINGS
from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.statistics import Statistics


class Rounding(Protocol):
    """A module that rounds weights."""

    def round(self, rows: torch.Tensor, grid: Grid, statistics: Statistics | None = None) -> GroupQuantized:
        """Put rows (n, K) of a weight, of any float type, on `grid`. Rows must not influence each other.

        Args:
            statistics: of the layer's inputs; None if nothing was collected.

        Raises:
            ValueError: if it cannot fill the grid's kind of zero point.
        """


def rounding(name: str) -> Rounding:
    """Return the rounding with that name in the catalogue; its module is imported now."""
    return cast(Rounding, importlib.import_module(ROUNDINGS[name].module))
