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
from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.formats import torchao
from pipeline.quantization.grid import Grid, GroupQuantized

ROW_MULTIPLE = 8
WIDTH_MULTIPLE = 1024

TABLE = torchao.TABLE
grid = torchao.grid
check = torchao.check
quantization_config = torchao.quantization_config


def together(grid: Grid) -> int:
    """Rows of a weight that one row of its stored codes holds."""
    return ROW_MULTIPLE if grid.bits == 4 else torchao.together(grid)


def plan(name: str, shape: tuple[int, int], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""
    if grid.bits != 4:
        return torchao.plan(name, shape, grid)
    (rows_, width), (qdata, scale_and_zero) = _padded(*shape), part_names(name)
    return {
        qdata: (torch.int32, (rows_ // 8, width // 128, 32, 4)),
        scale_and_zero: (torch.bfloat16, (width // grid.group_size, rows_, 2)),
    }


def rows(name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
    """The codes of a block of rows, as they are stored; a block begins at a multiple of `together` rows."""
    if block.grid.bits != 4:
        return torchao.rows(name, block)
    return {part_names(name)[0]: pack_codes(block.codes)}


def rest(name: str, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> dict[str, torch.Tensor]:
    """Scales and zeros (N, G) of a whole weight, as they are stored."""
    if grid.bits != 4:
        return torchao.rest(name, scale, zero, grid)
    rows_, groups = scale.shape
    to_rows, to_width = _padded(rows_, groups * grid.group_size)
    both = torch.stack((scale.T, zero.T), dim=-1)
    padding = (0, 0, 0, to_rows - rows_, 0, to_width // grid.group_size - groups)
    return {part_names(name)[1]: torch.nn.functional.pad(both, padding).contiguous()}


def metadata(
    spec: VariantSpec,
    grids: Mapping[str, tuple[tuple[int, int], Grid]],
    plain: Iterable[str],
    dtypes: Mapping[str, torch.dtype],
    tables: Collection[str],
) -> dict[str, str]:
    """The header metadata, the same for every shard; see `torchao.metadata`."""
    tiled = {name: entry for name, entry in grids.items() if entry[1].bits == 4}
    others = {name: entry for name, entry in grids.items() if name not in tiled}
    header = torchao.metadata(spec, others, plain, dtypes, tables)
    for name, (shape, grid) in tiled.items():
        data = {"block_size": [1, grid.group_size], "shape": shape}
        header[name] = torchao.entry("Int4TilePackedTo4dTensor", data, "qdata", "scale_and_zero")
    return header | {"tensor_names": json.dumps(json.loads(header["tensor_names"]) + list(tiled))}


def unpack(weight: torch.Tensor) -> GroupQuantized | None:
    """A weight as transformers loaded it, as portable codes; None for any other tensor."""
    from torchao.quantization import Int4TilePackedTo4dTensor

    if not isinstance(weight, Int4TilePackedTo4dTensor):
        return None
    return from_tiles(weight.qdata, weight.scale_and_zero, tuple(weight.shape), weight.block_size[-1])


def part_names(name: str) -> list[str]:
    """Names of the tensors that the int4 weight `name` is stored as."""
    module, _, parameter = name.rpartition(".")
    return [f"{module}._{parameter}_{part}" for part in ("qdata", "scale_and_zero")]


def read(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> GroupQuantized:
    """The codes, scales and zeros of a stored int4 weight, for a layer of `shape` (N, K).

    Raises:
        CheckpointError: where the stored parts are not those of such a layer.
    """
    found = {n: (checkpoint[n].dtype, checkpoint[n].shape) for n in part_names(name)}
    qdata, scale_and_zero = part_names(name)
    groups = next(iter(found[scale_and_zero][1]), 0)
    size = _padded(*shape)[1] // groups if groups else 0
    if size not in GROUP_SIZES or shape[1] % size or found != plan(name, shape, torchao.grouped(4, size)):
        raise CheckpointError(f"{name}: its stored parts are not those of a layer of {shape[0]} x {shape[1]}")
    return from_tiles(checkpoint.read(qdata), checkpoint.read(scale_and_zero), shape, size)


def tensor(weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
    """A weight as transformers loads it and saves it: the inverse of `unpack`; int4 is always of bfloat16."""
    if weight.grid.bits != 4:
        return torchao.tensor(weight, dtype)
    return _subclass(*to_tiles(weight), weight.grid, weight.codes.shape)


def to_tiles(weight: GroupQuantized) -> tuple[torch.Tensor, torch.Tensor]:
    """`qdata` and `scale_and_zero` of an int4 weight, on the device that it is on."""
    (scale_and_zero,) = rest("w", weight.scale, weight.zero, weight.grid).values()
    return pack_codes(weight.codes), scale_and_zero


def from_tiles(
    qdata: torch.Tensor, scale_and_zero: torch.Tensor, shape: tuple[int, int], group_size: int
) -> GroupQuantized:
    """The int4 weight of `shape` (N, K) that was stored so: the inverse of `to_tiles`."""
    rows_, width = shape
    inside = scale_and_zero[: width // group_size, :rows_]
    scale, zero = (part.T.contiguous() for part in inside.unbind(-1))
    return GroupQuantized(unpack_codes(qdata)[:rows_, :width].contiguous(), scale, zero, torchao.grouped(4, group_size))


# The order, for mma.m16n8k16: a warp's lane takes one of 8 rows and, of every 16 columns, the pairs that
# begin at 2 * (lane % 4) and 8 further. Two such pieces of 16 make a number of eight codes: going up, its
# nibbles are the even columns of the four pairs, then the odd ones. Four numbers (128 columns) lie together.


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes (N, K) int8 -> tiles (N' / 8, K' / 128, 32, 4) int32."""
    rows_, width = _padded(*codes.shape)
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


def _padded(rows: int, width: int) -> tuple[int, int]:
    return rows + -rows % ROW_MULTIPLE, width + -width % WIDTH_MULTIPLE


def _subclass(qdata: torch.Tensor, scale_and_zero: torch.Tensor, grid: Grid, shape: tuple[int, int]) -> torch.Tensor:
    from torchao.quantization import Int4TilePackedTo4dTensor

    return Int4TilePackedTo4dTensor(qdata, scale_and_zero, [1, grid.group_size], torch.Size(shape))
