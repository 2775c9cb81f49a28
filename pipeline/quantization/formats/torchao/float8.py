"""float8 that stock transformers loads with torchao: `Float8Tensor`, with one scale a row.

qdata (N, K) float8_e4m3fn, scale (N, 1) float32; with or without the wish that inputs be rounded to float8 too
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.safetensors import Grids, wrong_parts
from pipeline.quantization.formats.torchao import float8_sizes, header
from pipeline.quantization.formats.torchao.format import Torchao, stored_as, typed
from pipeline.quantization.grid import Grid, GroupQuantized

PARTS = ("qdata", "scale")
FLOAT8 = Grid(8, None, "none", torch.float32, positive=True, values="e4m3")


class Float8(Torchao):
    """float8 in rows; everything else as torchao has it."""

    holds_experts = stacks_experts = False
    dynamic = header.FLOAT8_DYNAMIC

    def grid(self, spec: VariantSpec, width: int) -> Grid:
        """Return the grid, which is the same for each width."""
        return FLOAT8

    def plan(self, name: str, shape: tuple[int, ...], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""
        return typed(stored_as(name, PARTS), float8_sizes.parts(shape))

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return the scales (N, 1) of a whole weight as they are stored."""
        return {stored_as(name, PARTS)["scale"]: scale}

    def metadata(
        self,
        spec: VariantSpec,
        grids: Grids,
        plain: Iterable[str],
        dtypes: Mapping[str, torch.dtype],
        tables: Collection[str],
    ) -> dict[str, str]:
        """Return the metadata of every file's header."""
        return header.float8_metadata(spec, {name: shape for name, (shape, _) in grids.items()}, plain, dtypes)

    def quantization_config(
        self, spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str], grids: Grids, folder: Path
    ) -> dict:
        """Return the `quantization_config` of config.json."""
        return header.described(header.float8_recipe(spec.variant.rounds_inputs), kept, tables, folder)

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint holds in this format."""
        found = [match.groups() for part in checkpoint if (match := self._matched(checkpoint, part, FLOAT8.code_dtype))]
        return [f"{layer}{part}" for layer, part in found]

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors that the weight `name` is stored as."""
        return list(stored_as(name, PARTS).values())

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> GroupQuantized:
        """Return the codes and scales of a stored weight, for a layer of `shape` (N, K)."""
        names = self.part_names(name)
        found = self.stored(checkpoint, name)
        if found != self.plan(name, shape, FLOAT8):
            raise wrong_parts(name, shape)
        codes, scale = map(checkpoint.read, names)
        return GroupQuantized(codes, scale, None, FLOAT8)

    def unpack(self, weight: torch.Tensor) -> GroupQuantized | None:
        """Return portable codes of a weight that transformers loaded; None for any other tensor."""
        from torchao.quantization import Float8Tensor

        if not isinstance(weight, Float8Tensor) or weight.act_quant_kwargs is not None:
            return None
        return GroupQuantized(weight.qdata, weight.scale, None, FLOAT8)

    def tensor(self, weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
        """Return a weight as transformers loads it and saves it; it computes as `dtype`."""
        from torchao.quantization import Float8Tensor

        return Float8Tensor(weight.codes, weight.scale, [1, weight.shape[1]], dtype=dtype)


FORMAT = Float8()
