"""int4 in the order in which a tensor core reads it: torchao's `Int4TilePackedTo4dTensor`.

The one int4 layout that stock transformers and torchao run on any CUDA card from sm80 on,
without further packages. torch makes it on CUDA alone, but it is a fixed order of the codes
(aten/src/ATen/native/cuda/int4mm.cu), so here it is made, and undone, on any machine.

    qdata            (N' / 8, K' / 128, 32, 4) int32, eight codes to a number
    scale_and_zero   (K' / group, N', 2) bfloat16; value = code * scale + zero

Whole tiles are stored: N' is N rounded up to a multiple of 8, K' is K rounded up to one of 1024,
and what was added has codes, scales and zeros of 0. What is not int4 is stored as
`pipeline.quantization.formats.torchao` has it.

No kernel has read these bytes yet: the order was checked on CPUs, against the tensor cores'
documented one. `tests/quantization/test_tile_packed.py` compares it with torch's where a card is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

import torch

from pipeline.config.catalog import GROUP_SIZES
from pipeline.config.schema import VariantSpec
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.safetensors import Grids, wrong_parts
from pipeline.quantization.formats.tile_packed import sizes
from pipeline.quantization.formats.torchao import header
from pipeline.quantization.formats.torchao.format import Torchao, grouped, stored_as, typed
from pipeline.quantization.grid import Grid, GroupQuantized

PARTS = ("qdata", "scale_and_zero")


class TilePacked(Torchao):
    """int4 in tiles; everything else as torchao has it."""

    packing = "TILE_PACKED_TO_4D"

    def together(self, grid: Grid) -> int:
        """Return the rows of a weight that one row of its stored codes holds."""
        return sizes.ROW_MULTIPLE if grid.bits == 4 else super().together(grid)

    def plan(self, name: str, shape: tuple[int, ...], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""
        if grid.bits != 4:
            return super().plan(name, shape, grid)
        return typed(stored_as(name, PARTS), sizes.parts(shape, grid.group(shape[1])))

    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows as stored; a block begins at a multiple of `together` rows."""
        if block.grid.bits != 4:
            return super().rows(name, block)
        return {stored_as(name, PARTS)["qdata"]: pack_codes(block.codes)}

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return scales and zeros (N, G) of a whole weight of `shape` (N, K) as they are stored."""
        if zero is None:
            return super().rest(name, shape, scale, zero, grid)
        return {stored_as(name, PARTS)["scale_and_zero"]: _together(scale, zero, grid.group(0))}

    def metadata(
        self,
        spec: VariantSpec,
        grids: Grids,
        plain: Iterable[str],
        dtypes: Mapping[str, torch.dtype],
        tables: Collection[str],
    ) -> dict[str, str]:
        """Return the metadata of every file's header."""
        tiled = {name: entry for name, entry in grids.items() if entry[1].bits == 4}
        others = {name: entry for name, entry in grids.items() if name not in tiled}
        found = super().metadata(spec, others, plain, dtypes, tables)
        for name, (shape, grid) in tiled.items():
            data = {"block_size": [1, grid.group_size], "shape": shape}
            found[name] = header.entry("Int4TilePackedTo4dTensor", data, *PARTS)
        return found | {"tensor_names": json.dumps(json.loads(found["tensor_names"]) + list(tiled))}

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint holds in this format."""
        ends = [part.removesuffix("._weight_qdata") for part in checkpoint if part.endswith("._weight_qdata")]
        return [f"{module}.weight" for module in ends if f"{module}._weight_scale_and_zero" in checkpoint]

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors that the int4 weight `name` is stored as."""
        return list(stored_as(name, PARTS).values())

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> GroupQuantized:
        """Return the codes, scales and zeros of a stored int4 weight, for a layer of `shape` (N, K)."""
        qdata, scale_and_zero = self.part_names(name)
        found = self.stored(checkpoint, name)
        groups = next(iter(found.get(scale_and_zero, (None, ()))[1]), 0)
        size = sizes.padded(*shape)[1] // groups if groups else 0
        if size not in GROUP_SIZES or shape[1] % size or found != self.plan(name, shape, grouped(4, size)):
            raise wrong_parts(name, shape)
        return from_tiles(checkpoint.read(qdata), checkpoint.read(scale_and_zero), shape, size)

    def unpack(self, weight: torch.Tensor) -> GroupQuantized | None:
        """Return portable codes of a weight that transformers loaded; None for any other tensor."""
        from torchao.quantization import Int4TilePackedTo4dTensor

        if not isinstance(weight, Int4TilePackedTo4dTensor):
            return None
        return from_tiles(weight.qdata, weight.scale_and_zero, tuple(weight.shape), weight.block_size[-1])

    def tensor(self, weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
        """Return a weight as transformers loads it and saves it; int4 always computes as bfloat16."""
        from torchao.quantization import Int4TilePackedTo4dTensor

        if weight.grid.bits != 4:
            return super().tensor(weight, dtype)
        return Int4TilePackedTo4dTensor(*to_tiles(weight), [1, weight.grid.group_size], torch.Size(weight.codes.shape))


FORMAT = TilePacked()


def to_tiles(weight: GroupQuantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `qdata` and `scale_and_zero` of an int4 weight, on its device."""
    if weight.zero is None or weight.grid.group_size is None:
        raise ValueError(f"not an int4 weight in groups: {weight.grid}")
    return pack_codes(weight.codes), _together(weight.scale, weight.zero, weight.grid.group_size)


def _together(scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> torch.Tensor:
    rows, groups = scale.shape
    to_rows, to_width = sizes.padded(rows, groups * group_size)
    both = torch.stack((scale.T, zero.T), dim=-1)
    padding = (0, 0, 0, to_rows - rows, 0, to_width // group_size - groups)
    return torch.nn.functional.pad(both, padding).contiguous()


def from_tiles(
    qdata: torch.Tensor, scale_and_zero: torch.Tensor, shape: tuple[int, ...], group_size: int
) -> GroupQuantized:
    """Return the int4 weight of `shape` (N, K) that was stored so: the inverse of `to_tiles`."""
    rows_, width = shape
    inside = scale_and_zero[: width // group_size, :rows_]
    scale, zero = (part.T.contiguous() for part in inside.unbind(-1))
    return GroupQuantized(unpack_codes(qdata)[:rows_, :width].contiguous(), scale, zero, grouped(4, group_size))


# The order, for mma.m16n8k16: a warp's lane takes one of 8 rows and, of every 16 columns, the pairs that
# begin at 2 * (lane % 4) and 8 further. Two such pieces of 16 make a number of eight codes: going up, its
# nibbles are the even columns of the four pairs, then the odd ones. Four numbers (128 columns) lie together.


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes (N, K) int8 -> tiles (N' / 8, K' / 128, 32, 4) int32."""
    rows_, width = sizes.padded(*codes.shape)
    codes = torch.nn.functional.pad(codes, (0, width - codes.shape[1], 0, rows_ - codes.shape[0]))
    low, high = (codes + 8).view(torch.uint8).view(-1, 2, 8).unbind(1)  # of every 16 columns, the first 8 and the rest
    octets = (low | high << 4).view(rows_ // 8, 8, width // 128, 4, 2, 4, 2)  # row; number, 16 columns in it, lane, odd
    lanes = octets.permute(0, 2, 1, 5, 3, 6, 4).contiguous()
    return lanes.view(-1).view(torch.int32).view(rows_ // 8, width // 128, 32, 4)


def unpack_codes(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (N' / 8, K' / 128, 32, 4) int32 -> signed codes (N', K') int8: the inverse of `pack_codes`."""
    eights, many = tiles.shape[:2]
    lanes = tiles.contiguous().view(torch.uint8).view(eights, many, 8, 4, 4, 2, 2)
    octets = lanes.permute(0, 2, 1, 4, 6, 3, 5).reshape(-1, 8)
    codes = torch.stack((octets & 0xF, octets >> 4), dim=1)
    return codes.view(torch.int8).view(eights * 8, many * 128) - 8
