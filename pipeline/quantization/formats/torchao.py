"""Safetensors that stock transformers loads with torchao: `Int8Tensor` and `Int4Tensor`.

Both are stored flat, as `LAYER._weight_qdata`, `LAYER._weight_scale` and
`LAYER._weight_zero_point`, and described in the metadata of every file as torchao's
own encoder does. Nothing in them depends on a processor.

    Int8Tensor   qdata (N, K) int8, scale (N, G) float32, zero_point (N, G) int8 of zeros; G is 1, or K/group;
                 with or without the wish that inputs be rounded to int8 too
    Int4Tensor   qdata (N, K/2) int8, even column in the low nibble; scale and
                 zero_point (K/group, N) bfloat16; value = code * scale + zero_point
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config.catalog import GROUP_SIZES, VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, ModelError, QuantizationError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import PLAIN_TABLE, embedding_kind
from pipeline.quantization.grid import Grid, GroupQuantized, fitting_group_size, pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DYNAMIC = "int8-dynamic"  # the variant whose layers round what they are given as well, token by token
_PACKINGS = {"plain": "PLAIN", "tile_packed": "TILE_PACKED_TO_4D"}  # torchao's names for ours
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}


def _recipe(kind: str, version: int, **data: object) -> dict:
    """Return how torchao writes a configuration of the class `kind`."""
    return {"_type": kind, "_version": version, "_data": data}


_PER_ROW = _recipe("PerRow", 1, dim=-1)
INT8 = Grid(bits=8, group_size=None, zero="none", scale_dtype=torch.float32)
TABLE = INT8  # of embeddings and output heads, where they are quantized


def grid(spec: VariantSpec, width: int) -> Grid:
    """The grid of a layer with `width` columns: the largest group size up to the one asked for that divides it.

    Raises:
        QuantizationError: if none does; such a layer can only be kept as it is.
    """
    if spec.group_size is None:
        return INT8
    size = fitting_group_size(width, spec.group_size)
    if size is None:
        raise QuantizationError(
            f"{spec.name}: no group size of {', '.join(map(str, GROUP_SIZES))} up to {spec.group_size} divides "
            f"a width of {width}; name such layers under 'keep' to leave them in bf16"
        )
    return grouped(VARIANTS[spec.name].bits, size)


def check(spec: VariantSpec, folder: Path) -> None:
    """Any model of linear layers can be stored so; its table in int8 where that only looks rows up.

    Raises:
        ModelError: where it does more. Of a Gemma's, which multiplies the rows too, the stock loader
            leaves the factor unset if the table is quantized.
    """
    if spec.embeddings == "int8" and (kind := embedding_kind(folder)) != PLAIN_TABLE:
        raise ModelError(f"{folder}: stock transformers cannot load a {kind} in int8; use embeddings: keep")


def grouped(bits: int, size: int) -> Grid:
    """The grid of so many bits in groups of `size` columns."""
    return replace(INT8, group_size=size) if bits == 8 else Grid(4, size, "float", torch.bfloat16)


def together(grid: Grid) -> int:
    """Rows of a weight that one row of its stored codes holds."""
    return 1


def plan(name: str, shape: tuple[int, int], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""
    (rows_, width), part = shape, _parts(name)
    groups = width // grid.group(width)
    if grid.bits == 8:
        return {
            part["qdata"]: (torch.int8, (rows_, width)),
            part["scale"]: (torch.float32, (rows_, groups)),
            part["zero_point"]: (torch.int8, (rows_, groups)),
        }
    return {
        part["qdata"]: (torch.int8, (rows_, width // 2)),
        part["scale"]: (torch.bfloat16, (groups, rows_)),
        part["zero_point"]: (torch.bfloat16, (groups, rows_)),
    }


def rows(name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
    """The codes of a block of rows, as they are stored."""
    codes = block.codes if block.grid.bits == 8 else pack_nibbles(block.codes)
    return {_parts(name)["qdata"]: codes}


def rest(name: str, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> dict[str, torch.Tensor]:
    """Scales and zeros (N, G) of a whole weight, as they are stored."""
    part = _parts(name)
    if zero is None:
        return {part["scale"]: scale, part["zero_point"]: torch.zeros(scale.shape, dtype=torch.int8)}
    return {part["scale"]: scale.T.contiguous(), part["zero_point"]: zero.T.contiguous()}


def metadata(
    spec: VariantSpec,
    grids: Mapping[str, tuple[tuple[int, int], Grid]],
    plain: Iterable[str],
    dtypes: Mapping[str, torch.dtype],
    tables: Collection[str],
) -> dict[str, str]:
    """The header metadata, the same for every shard.

    Args:
        grids: quantized weights: name -> (shape, grid).
        plain: names of the tensors that stay as they are.
        dtypes: what the quantized weights were before, and what they compute as again.
        tables: those of them that are the embedding or the output head.
    """
    entries = {name: json.dumps({"_type": "Tensor"}) for name in plain}
    for name, (shape, grid) in grids.items():
        if grid.bits == 8:
            entries[name] = _int8_entry(shape, grid, dtypes[name], spec.name == DYNAMIC and name not in tables)
        else:
            data = {"activation_dtype": _dtype(torch.bfloat16), "block_size": [1, grid.group_size], "shape": shape}
            entries[name] = entry("Int4Tensor", data, "qdata", "scale", "zero_point")
    return {**entries, "tensor_names": json.dumps(list(entries))}


def entry(kind: str, data: Mapping[str, object], *parts: str) -> str:
    """Return how torchao's encoder writes a tensor of the class `kind`, which is stored in these parts.

    The text is made here, because to import torchao takes longer than to quantize a small model.
    """
    return json.dumps({"_type": kind, "_data": data, "_tensor_data_names": parts})


def _int8_entry(shape: tuple[int, int], grid: Grid, dtype: torch.dtype, dynamic: bool) -> str:
    inputs = {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": _SYMMETRIC,
        "reduce_range": False,
    }
    data = {
        "act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": inputs} if dynamic else None,
        "reduce_range": False,
        "block_size": [1, grid.group(shape[1])],
        "dtype": _dtype(dtype),
    }
    return entry("Int8Tensor", data, "zero_point", "qdata", "scale")


def _dtype(dtype: torch.dtype) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def quantization_config(spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str]) -> dict:
    """The `quantization_config` of config.json.

    Args:
        kept: modules that stay in bf16, though they are of those that are quantized.
        tables: the embedding and the output head, where they are in int8.
        eight: layers in int8, where the others have fewer bits.
    """
    if spec.name == "int4":
        kind = _recipe(
            "Int4WeightOnlyConfig",
            2,
            group_size=spec.group_size,
            int4_packing_format={"_type": "Int4PackingFormat", "_data": _PACKINGS[spec.packing]},
            int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
            int4_tile_packed_ntile=8,
            set_inductor_config=True,
        )
    elif spec.name == DYNAMIC:
        kind = _recipe(
            "Int8DynamicActivationInt8WeightConfig",
            2,
            act_mapping_type=_SYMMETRIC,
            granularity=_PER_ROW,
            reduce_range=False,
            set_inductor_config=True,
            weight_only_decode=False,
        )
    else:
        kind = _int8_recipe(spec.group_size)
    if tables or eight:
        kinds = {**dict.fromkeys([*tables, *eight], _int8_recipe(None)), "_default": kind}
        kind = _recipe("FqnToConfig", 1, fqn_to_config=kinds, module_fqn_to_config=kinds)
    # A list here replaces transformers' own, so the output head must stand in it too, unless it is quantized.
    listed = kept if tables else ["lm_head", *kept] if kept else None
    return {
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "modules_to_not_convert": listed,
        "include_input_output_embeddings": bool(tables),
        "untie_embedding_weights": False,
    }


def _int8_recipe(group_size: int | None) -> dict:
    granularity = _recipe("PerGroup", 1, group_size=group_size) if group_size else _PER_ROW
    return _recipe("Int8WeightOnlyConfig", 2, granularity=granularity, group_size=None, set_inductor_config=True)


def unpack(weight: torch.Tensor) -> GroupQuantized | None:
    """A weight as transformers loaded it, as portable codes; None for an ordinary tensor.

    None also for one that rounds what it is multiplied with, for its codes are not all that it computes.
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


def part_names(name: str) -> list[str]:
    """Names of the tensors that the weight `name` is stored as."""
    return list(_parts(name).values())


def read(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> GroupQuantized:
    """The codes, scales and zeros of a stored weight, for a layer of `shape` (N, K).

    Raises:
        CheckpointError: where the stored parts are not those of such a layer.
    """
    part = _parts(name)
    found = {n: (checkpoint[n].dtype, checkpoint[n].shape) for n in part.values() if n in checkpoint}
    counts = found.get(part["scale"], (None, ()))[1]  # one of them that of the groups in a row
    sizes = [shape[1] // count for count in counts if count and shape[1] % count == 0]
    grids = (INT8, *(grouped(bits, size) for bits in (8, 4) for size in sizes))
    fits = next((grid for grid in grids if found == plan(name, shape, grid)), None)
    if fits is None:
        raise CheckpointError(f"{name}: its stored parts are not those of a layer of {shape[0]} x {shape[1]}")
    codes, scale = checkpoint.read(part["qdata"]), checkpoint.read(part["scale"])
    if fits.bits == 8:
        return GroupQuantized(codes, scale, None, fits)
    zero = checkpoint.read(part["zero_point"])
    return GroupQuantized(unpack_nibbles(codes), scale.T.contiguous(), zero.T.contiguous(), fits)


def tensor(weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
    """A weight as transformers loads it and saves it: the inverse of `unpack`.

    Args:
        dtype: what an int8 weight computes as.
    """
    shape = tuple(weight.codes.shape)
    stored = rows("w.weight", weight) | rest("w.weight", weight.scale, weight.zero, weight.grid)
    return _subclass(*(stored[n] for n in part_names("w.weight")), shape, weight.grid, dtype)


def _parts(name: str) -> dict[str, str]:
    module, _, parameter = name.rpartition(".")
    return {part: f"{module}._{parameter}_{part}" for part in ("qdata", "scale", "zero_point")}


def rounds_activations(config: PretrainedConfig) -> bool:
    """Is this the configuration of a model whose layers round their inputs too, as int8-dynamic's do?"""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        return Int8DynamicActivationInt8WeightConfig.__name__ in json.dumps(quantization)
    return False


def _subclass(qdata, scale, zero_point, shape, grid, dtype):
    from torchao.quantization import Int4Tensor, Int8Tensor

    if grid.bits == 8:
        return Int8Tensor(qdata, scale, [1, grid.group(shape[1])], dtype, zero_point=zero_point)
    return Int4Tensor(qdata, scale, zero_point, [1, grid.group_size], torch.Size(shape))
