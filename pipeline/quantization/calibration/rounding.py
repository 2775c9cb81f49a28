"""The layers of a decoder block, rounded with the statistics of their inputs, on all cores.

Layers with the same input are rounded together, in parts of fixed size. So the bytes do not depend on the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.models.checkpoint.row_blocks import in_parallel
from pipeline.quantization.grid import Grid, GroupQuantized, joined
from pipeline.quantization.roundings import Rounding
from pipeline.quantization.statistics import Collected, Statistics

ROWS = 1024  # of a part. Parts have at least as many rows as columns, because each factors the Gram matrix

ReadRows = Callable[[str, int, int], torch.Tensor]  # name of a weight, first row and stop row


@dataclass(frozen=True)
class _Part:
    """Rows of layers with the same input and the same grid, as (name, first row, stop row)."""

    spans: list[tuple[str, int, int]]
    grid: Grid
    statistics: Statistics

    @property
    def cost(self) -> int:
        """Return a number that grows with the time of rounding."""
        width = len(self.statistics.second_moments)
        return width * width * (width + sum(stop - first for _, first, stop in self.spans))


def round_layers(
    how: Rounding, read: ReadRows, grids: Mapping[str, tuple[tuple[int, int], Grid]], collected: Collected
) -> dict[str, GroupQuantized]:
    """Return the rounded weights of some layers, in main memory.

    Args:
        grids: the shape and the grid of each weight.
        collected: statistics of all these layers; the arithmetic runs on the device of their tensors.
    """
    rounded: dict[tuple[str, int], GroupQuantized] = {}

    def work(part: _Part) -> int:
        device = part.statistics.second_moments.device
        rows = torch.cat([read(*span) for span in part.spans]).to(device)
        made, done = how.round(rows, part.grid, part.statistics).to("cpu"), 0
        for name, first, stop in part.spans:
            rounded[name, first] = made.rows(done, done + stop - first)
            done += stop - first
        return len(rows)

    parts = sorted(_parts(grids, collected), key=lambda part: part.cost, reverse=True)
    on_cpu = all(part.statistics.second_moments.device.type == "cpu" for part in parts)
    in_parallel([partial(work, part) for part in parts], 0, threads=None if on_cpu else 1)
    return {name: joined([rounded[key] for key in sorted(rounded) if key[0] == name]) for name in grids}


def _parts(grids: Mapping[str, tuple[tuple[int, int], Grid]], collected: Collected) -> Iterator[_Part]:
    together: dict[tuple[int, Grid], list[str]] = {}
    for name, (_, grid) in grids.items():
        together.setdefault((id(collected[name]), grid), []).append(name)
    for (_, grid), names in together.items():
        spans: list[tuple[str, int, int]] = []
        statistics, room = collected[names[0]], 0
        limit = max(ROWS, len(statistics.second_moments))
        for name in names:
            rows, first = grids[name][0][0], 0
            while first < rows:
                if not room:
                    if spans:
                        yield _Part(spans, grid, statistics)
                    spans, room = [], limit
                stop = min(first + room, rows)
                spans.append((name, first, stop))
                room -= stop - first
                first = stop
        yield _Part(spans, grid, statistics)
