"""What GPTQ and AWQ have in common: four-bit codes, eight to an int32, and every part stored as columns by rows.

A weight (N, K) becomes `LAYER.qweight`, `LAYER.qzeros` (G, N / 8) int32, and `LAYER.scales` (G, N) float16, G groups to
a row. Embedding and output head stay as they are, because servers load no quantized ones.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import ModuleType

import torch

from pipeline.config.catalog import GROUP_SIZES
from pipeline.config.schema import VariantSpec
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.gptq.sizes import CODES
from pipeline.quantization.formats.safetensors import Grids, SafetensorsFormat, wrong_parts
from pipeline.quantization.grid import Grid, GroupQuantized

G_IDX = "g_idx"  # the part that only GPTQ has: the group of each column


class Transposed(SafetensorsFormat):
    """A format of four-bit codes that are stored as columns by rows.

    Attributes:
        sizes: the module of its sizes.
        rows_grid: its grid with one scale a row.
    """

    by_columns = True
    replaces_layers = True
    sizes: ModuleType
    rows_grid: Grid

    def grid(self, spec: VariantSpec, width: int) -> Grid:
        """Return the grid of a layer with `width` columns."""
        return self._grouped(spec.group_size)

    def _grouped(self, size: int | None) -> Grid:
        return replace(self.rows_grid, group_size=size)

    def together(self, grid: Grid) -> int:
        """Return the rows of a weight that one column of its stored codes holds."""
        return CODES

    def plan(self, name: str, shape: tuple[int, ...], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""
        parts = self.sizes.parts(shape, grid.group(shape[1]))
        return {part(name, kind): (getattr(torch, dtype), part_shape) for kind, (dtype, part_shape) in parts.items()}

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint holds in this format."""
        ends = [stored.removesuffix(".qweight") for stored in checkpoint if stored.endswith(".qweight")]
        has = G_IDX in self._part_kinds()
        return [f"{module}.weight" for module in ends if (f"{module}.{G_IDX}" in checkpoint) == has]

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors that the weight `name` is stored as."""
        return [part(name, kind) for kind in self._part_kinds()]

    def _part_kinds(self) -> list[str]:
        return list(self.sizes.parts((CODES, CODES), CODES))

    def state(self, name: str, weight: GroupQuantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the entries of a state dict for the weight `name`: its stored parts."""
        weight, shape = weight.to("cpu"), (weight.shape[0], weight.shape[1])
        return self.rows(name, weight) | self.rest(name, shape, weight.scale, weight.zero, weight.grid)

    def stored_grid(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> Grid:
        """Return the grid of a stored weight of a layer of `shape` (N, K).

        Raises:
            CheckpointError: if its stored parts are not those of such a layer.
        """
        found = self.stored(checkpoint, name)
        groups = next(iter(found.get(part(name, "scales"), (None, ()))[1]), 0)
        size = shape[1] // groups if groups and shape[1] % groups == 0 else None
        if size is None or found != self.plan(name, shape, self._grouped(size)):
            raise wrong_parts(name, shape)
        return self._grouped(size if groups > 1 or size in GROUP_SIZES else None)


def part(name: str, kind: str) -> str:
    """Return the name of a stored part of the weight `name`."""
    return f"{name.rpartition('.')[0]}.{kind}"


def group_size(grids: Grids) -> int:
    """Return the one group size of all layers as these formats write it: -1 for one scale a row."""
    return next((grid.group_size for _, grid in grids.values() if grid.group_size), -1)
