"""Safetensors that servers and stock transformers load with compressed-tensors.

Each weight is stored as codes, and as `weight_scale` (N, G) bfloat16 with G = 1 or K / group; value = code * scale.
There are no zeros, since stock transformers cannot load those of four bits. Scales are positive, because not every
kernel of a server was tested with others. The embedding and the output head stay as they are, as servers expect.

`packed` and `unpacked` are the two ways to store codes.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.catalog import GROUP_SIZES, fitting_group_size
from pipeline.config.schema import VariantSpec
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.compressed_tensors import header, sizes
from pipeline.quantization.formats.safetensors import Grids, SafetensorsFormat, wrong_parts
from pipeline.quantization.grid import Grid, GroupQuantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]
SOME_ARE_KEPT = "stock transformers cannot load experts of which some are kept"


class CompressedTensors(SafetensorsFormat):
    """Symmetric codes in groups or rows."""

    replaces_layers = True
    holds_experts = True
    kinds: tuple[tuple[int, str], ...]  # bits and values of the grids that it stores

    @abstractmethod
    def parts(self, shape: tuple[int, ...], grid: Grid) -> sizes.Parts:
        """Return the stored parts of a weight of `shape` (N, K)."""

    def grid(self, spec: VariantSpec, width: int) -> Grid:
        """Return the grid with the largest group size up to that of `spec` that divides the width, or else of rows."""
        size = spec.group_size and fitting_group_size(width, spec.group_size)
        return _grid(spec.variant.bits, spec.variant.values, size)

    def plan(self, name: str, shape: tuple[int, ...], grid: Grid) -> Plan:
        """Return the stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""
        parts = self.parts(shape, grid).items()
        return {stored_as(name, part): (getattr(torch, dtype), size) for part, (dtype, size) in parts}

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return the scales (N, G) of a whole weight of `shape` (N, K) as they are stored."""
        return {stored_as(name, "weight_scale"): scale}

    def quantization_config(
        self, spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str], grids: Grids, folder: Path
    ) -> dict:
        """Return the `quantization_config` of config.json."""
        return header.quantization_config(spec.variant, kept, grids, folder)

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors that the weight `name` can be stored as."""
        return [stored_as(name, part) for part in sizes.NAMES]

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> GroupQuantized:
        """Return the codes and scales of a stored weight, for a layer of `shape` (N, K)."""
        found = self.stored(checkpoint, name)
        grids = (_grid(*kind, size) for kind in self.kinds for size in (None, *GROUP_SIZES))
        fitting = (grid for grid in grids if shape[1] % grid.group(shape[1]) == 0)
        fits = next((grid for grid in fitting if found == self.plan(name, shape, grid)), None)
        if fits is None:
            raise wrong_parts(name, shape)
        codes = self.codes(checkpoint, name, shape[1], fits)
        return GroupQuantized(codes, checkpoint.read(stored_as(name, "weight_scale")), None, fits)

    @abstractmethod
    def shape(self, checkpoint: StoredTensors, name: str) -> tuple[int, int]:
        """Return (N, K) of a stored weight."""

    def stock_bytes(self, checkpoint: Checkpoint, name: str) -> int:
        """Return the bytes of a stored weight as stock transformers holds it while the model runs: dequantized."""
        rows, width = self.shape(checkpoint, name)
        return rows * width * checkpoint[stored_as(name, "weight_scale")].dtype.itemsize

    @abstractmethod
    def codes(self, checkpoint: StoredTensors, name: str, width: int, grid: Grid) -> torch.Tensor:
        """Return the codes (N, K) of a stored weight with `width` columns."""

    def state(self, name: str, weight: GroupQuantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the entries of a state dict for the weight `name`, as files of this format have them."""
        shape = (weight.shape[0], weight.shape[1])
        return self.rows(name, weight) | self.rest(name, shape, weight.scale, None, weight.grid)

    def rounds_inputs(self, config: PretrainedConfig) -> bool:
        """Return True if layers of this model round their inputs too."""
        quantization: Any = getattr(config, "quantization_config", None)
        groups = quantization.get("config_groups", {}) if isinstance(quantization, dict) else {}
        return any(isinstance(group, dict) and group.get("input_activations") for group in groups.values())


def _grid(bits: int, values: Any, group_size: int | None) -> Grid:
    return Grid(bits, group_size, "none", getattr(torch, sizes.SCALE), positive=True, values=values)


def stored_as(name: str, part: str) -> str:
    """Return the name of a stored part of the weight `name`."""
    return f"{name.rpartition('.')[0]}.{part}"
