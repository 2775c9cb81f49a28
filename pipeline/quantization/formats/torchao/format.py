"""Safetensors that stock transformers loads with torchao: `Int8Tensor` and `Int4Tensor`.

Both are stored flat, as `LAYER._weight_qdata`, `LAYER._weight_scale` and
`LAYER._weight_zero_point`, and described in the metadata of every file as torchao's
own encoder does. Nothing in them depends on a processor.

    Int8Tensor   qdata (N, K) int8, scale (N, G) float32, zero_point (N, G) int8 of zeros; G is 1, or K/group;
                 with or without the wish that inputs be rounded to int8 too;
                 a stack of experts is `LAYER._gate_up_proj_qdata` (E, N, K), and so on
    Int4Tensor   qdata (N, K/2) int8, even column in the low nibble; scale and
                 zero_point (K/group, N) bfloat16; value = code * scale + zero_point
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config.catalog import EIGHT_BITS, fitting_group_size
from pipeline.config.quantize import matches
from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError
from pipeline.models.experts import EXPERTS
from pipeline.models.matrices import PLAIN_TABLE, embedding_kind
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.safetensors import Grids, SafetensorsFormat, wrong_parts
from pipeline.quantization.formats.torchao import header, sizes, trial
from pipeline.quantization.grid import Grid, GroupQuantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INT8 = Grid(bits=8, group_size=None, zero="none", scale_dtype=torch.float32)
PARTS = ("qdata", "scale", "zero_point")
_CODES = re.compile(r"(.*\.)_(\w+)_qdata")


def grouped(bits: int, size: int) -> Grid:
    """Return the grid of so many bits in groups of `size` columns."""
    return replace(INT8, group_size=size) if bits == 8 else Grid(4, size, "float", torch.bfloat16)


def stored_as(name: str, parts: Collection[str]) -> dict[str, str]:
    """Return the names of the tensors that the weight `name` is stored as, by part."""
    module, _, parameter = name.rpartition(".")
    return {part: f"{module}._{parameter}_{part}" for part in parts}


def typed(names: Mapping[str, str], parts: sizes.Parts) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the dtype and shape of each stored tensor."""
    return {names[part]: (getattr(torch, dtype), shape) for part, (dtype, shape) in parts.items()}


class Torchao(SafetensorsFormat):
    """int8, and int4 in rows."""

    TABLE = INT8
    holds_experts = stacks_experts = True
    packing = "PLAIN"  # torchao's name of the order of four-bit codes
    dynamic = header.DYNAMIC  # torchao's name of the settings of layers that round their inputs

    def grid(self, spec: VariantSpec, width: int) -> Grid:
        """Return the grid with the largest group size up to that of `spec` that divides the width."""
        if spec.group_size is None:
            return INT8
        size = fitting_group_size(width, spec.group_size)
        assert size is not None, "`sizes.misfit` refuses such a layer"
        return grouped(spec.variant.bits, size)

    def check(self, spec: VariantSpec, folder: Path) -> None:
        """Raise ModelError if stock transformers cannot load or run the variant.

        A Gemma's embedding also multiplies the rows. The stock loader leaves its factor unset if it is quantized.
        Some layers are used in ways that torchao's tensors do not have.
        """
        if spec.quantizes_embeddings and (kind := embedding_kind(folder)) != PLAIN_TABLE:
            raise ModelError(f"{folder}: stock transformers cannot load a {kind} in int8; use embeddings: keep")
        if layers := trial.unusable_layers(folder, spec.keep, self._on_meta):
            raise ModelError(
                f"{folder}: stock transformers cannot run {', '.join(layers)} in {spec.name}, since the model does "
                f"more with their weights than a linear layer. Try: keep these layers in {spec.name}, or leave it out"
            )

    def refuses_experts(self, spec: VariantSpec, names: Collection[str]) -> str | None:
        """Return a reason if experts would have few bits: torchao cannot choose one of a stack of `Int4Tensor`."""
        few = spec.variant.bits < INT8.bits and self.holds_experts
        if few and not all(matches([*spec.keep, *spec.int8], name) for name in names):
            return (
                f"stock transformers cannot run experts in {spec.variant.bits} bits of torchao, but in eight "
                f"({EIGHT_BITS}: ['*{EXPERTS}*'])"
            )
        return super().refuses_experts(spec, names)

    def _on_meta(self, shape: tuple[int, ...]) -> torch.Tensor:
        codes, scale = torch.empty(shape, dtype=torch.int8, device="meta"), torch.empty(shape[0], 1, device="meta")
        return FORMAT.tensor(GroupQuantized(codes, scale, None, INT8), torch.bfloat16)

    def plan(self, name: str, shape: tuple[int, ...], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the stored tensors of the weight `name` of `shape` (N, K), or (E, N, K): name -> (dtype, shape)."""
        return typed(stored_as(name, PARTS), sizes.parts(shape, grid.bits, grid.group(shape[-1])))

    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows as they are stored."""
        codes = block.codes if block.grid.bits == 8 else pack_nibbles(block.codes)
        return {stored_as(name, PARTS)["qdata"]: codes}

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return scales and zeros (N, G) of a whole weight of `shape` (N, K) as they are stored."""
        part = stored_as(name, PARTS)
        if zero is None:
            return {part["scale"]: scale, part["zero_point"]: torch.zeros(scale.shape, dtype=torch.int8)}
        return {part["scale"]: scale.T.contiguous(), part["zero_point"]: zero.T.contiguous()}

    def metadata(
        self,
        spec: VariantSpec,
        grids: Grids,
        plain: Iterable[str],
        dtypes: Mapping[str, torch.dtype],
        tables: Collection[str],
    ) -> dict[str, str]:
        """Return the metadata of every file's header."""
        return header.metadata(spec, grids, plain, dtypes, tables)

    def quantization_config(
        self, spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str], grids: Grids, folder: Path
    ) -> dict:
        """Return the `quantization_config` of config.json."""
        stacks = [name for name, (shape, _) in grids.items() if len(shape) == 3]
        return header.quantization_config(spec, self.packing, kept, tables, eight, folder, stacks)

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint holds in this format."""
        found = [match.groups() for part in checkpoint if (match := self._matched(checkpoint, part, torch.int8))]
        return [f"{layer}{part}" for layer, part in found if f"{layer}_{part}_scale_and_zero" not in checkpoint]

    def _matched(self, checkpoint: StoredTensors, part: str, codes: torch.dtype) -> re.Match | None:
        """Return the layer and the parameter of a stored part that holds codes of a dtype; None for any other."""
        match = _CODES.fullmatch(part)
        return match if match and checkpoint[part].dtype == codes else None

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors that the weight `name` is stored as."""
        return list(stored_as(name, PARTS).values())

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> GroupQuantized:
        """Return the codes, scales and zeros of a stored weight, for a layer of `shape` (N, K).

        A stack of experts (E, N, K) is returned with the rows of all experts in one matrix.
        """
        part = stored_as(name, PARTS)
        found = self.stored(checkpoint, name)
        counts = found.get(part["scale"], (None, ()))[1]  # one of them is the number of groups in a row
        widths = [shape[-1] // count for count in counts if count and shape[-1] % count == 0]
        grids = (INT8, *(grouped(bits, size) for bits in (8, 4) for size in widths))
        fits = next((grid for grid in grids if found == self.plan(name, shape, grid)), None)
        if fits is None:
            raise wrong_parts(name, shape)
        codes, scale = checkpoint.read(part["qdata"]), checkpoint.read(part["scale"])
        if fits.bits == 8:
            return GroupQuantized(codes.flatten(0, -2), scale.flatten(0, -2), None, fits)
        zero = checkpoint.read(part["zero_point"])
        return GroupQuantized(unpack_nibbles(codes), scale.T.contiguous(), zero.T.contiguous(), fits)

    def unpack(self, weight: torch.Tensor) -> GroupQuantized | None:
        """Return portable codes of a weight that transformers loaded; None for any other tensor.

        None also for a weight that rounds what it is multiplied with: its codes are not all that it computes.
        """
        from torchao.quantization import Int4Tensor, Int8Tensor

        if isinstance(weight, Int8Tensor) and weight.act_quant_kwargs is not None:
            return None
        if isinstance(weight, Int8Tensor):
            grid = INT8 if weight.scale.shape[-1] == 1 else grouped(8, weight.block_size[-1])
            return GroupQuantized(weight.qdata, weight.scale, None, grid)
        if isinstance(weight, Int4Tensor):
            grid = grouped(4, weight.block_size[-1])
            return GroupQuantized(
                unpack_nibbles(weight.qdata), weight.scale.T.contiguous(), weight.zero_point.T.contiguous(), grid
            )
        return None

    def tensor(self, weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
        """Return a weight as transformers loads it and saves it; an int8 weight computes as `dtype`."""
        from torchao.quantization import Int4Tensor, Int8Tensor

        name, grid, shape = "w.weight", weight.grid, weight.codes.shape
        stored = self.rows(name, weight) | self.rest(name, tuple(shape), weight.scale, weight.zero, grid)
        qdata, scale, zero_point = (stored[n] for n in stored_as(name, PARTS).values())
        if grid.bits == 8:
            return Int8Tensor(qdata, scale, [1, grid.group(shape[1])], dtype, zero_point=zero_point)
        return Int4Tensor(qdata, scale, zero_point, [1, grid.group_size], torch.Size(shape))

    def rounds_inputs(self, config: PretrainedConfig) -> bool:
        """Return True if layers of this model round their inputs too, which torchao computes."""
        quantization = getattr(config, "quantization_config", None)
        return isinstance(quantization, dict) and self.dynamic in json.dumps(quantization)


FORMAT = Torchao()


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack four-bit codes (N, K) to bytes (N, K / 2) int8, with the even column in the low nibble."""
    pairs = codes.contiguous().view(torch.int16)  # the even column in the low byte; torch's machines are little-endian
    return ((pairs >> 4) & 0xF0).bitwise_or_(pairs & 0xF).to(torch.int8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes (N, K / 2) of `pack_nibbles` to signed codes (N, K), int8 in -8..7."""
    low = (packed << 4) >> 4  # int8 shifts keep the sign
    high = packed >> 4
    return torch.stack((low, high), dim=-1).view(packed.shape[0], -1)
