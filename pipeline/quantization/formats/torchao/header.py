"""How torchao and transformers describe quantized weights: in the header of every file, and in config.json.

The text is made here as torchao's own encoder writes it, because to import torchao takes longer than to
quantize a small model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import skipped_modules
from pipeline.quantization.grid import Grid

DYNAMIC = "Int8DynamicActivationInt8WeightConfig"  # of layers that round their inputs too
FLOAT8_DYNAMIC = "Float8DynamicActivationFloat8WeightConfig"
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}


def _recipe(kind: str, version: int, **data: object) -> dict:
    """Return a configuration of the class `kind`."""
    return {"_type": kind, "_version": version, "_data": data}


_PER_ROW = _recipe("PerRow", 1, dim=-1)


def metadata(
    spec: VariantSpec,
    grids: Mapping[str, tuple[tuple[int, ...], Grid]],
    plain: Iterable[str],
    dtypes: Mapping[str, torch.dtype],
    tables: Collection[str],
) -> dict[str, str]:
    """Return the header's metadata, which is the same for every shard.

    Args:
        grids: quantized weights and stacks of experts: name -> (shape, grid).
        plain: names of the tensors that stay as they are.
        dtypes: the types that the quantized weights had, and compute as again.
        tables: the embedding and the output head, as far as they are quantized.
    """
    entries = {name: json.dumps({"_type": "Tensor"}) for name in plain}
    for name, (shape, grid) in grids.items():
        if grid.bits == 8:
            rounds_inputs = spec.variant.rounds_inputs and name not in tables
            entries[name] = _int8_entry(shape, grid, dtypes[name], rounds_inputs)
        else:
            data = {"activation_dtype": _dtype(torch.bfloat16), "block_size": [1, grid.group_size], "shape": shape}
            entries[name] = entry("Int4Tensor", data, "qdata", "scale", "zero_point")
    return {**entries, "tensor_names": json.dumps(list(entries))}


def entry(kind: str, data: Mapping[str, object], *parts: str) -> str:
    """Return the entry of a tensor of the class `kind`, which is stored in these parts."""
    return json.dumps({"_type": kind, "_data": data, "_tensor_data_names": parts})


def _int8_entry(shape: tuple[int, ...], grid: Grid, dtype: torch.dtype, rounds_inputs: bool) -> str:
    inputs = {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": _SYMMETRIC,
        "reduce_range": False,
    }
    data = {
        "act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": inputs} if rounds_inputs else None,
        "reduce_range": False,
        "block_size": [*(1 for _ in shape[1:]), grid.group(shape[-1])],
        "dtype": _dtype(dtype),
    }
    return entry("Int8Tensor", data, "zero_point", "qdata", "scale")


def _dtype(dtype: torch.dtype) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def quantization_config(
    spec: VariantSpec,
    packing: str,
    kept: list[str],
    tables: list[str],
    eight: list[str],
    folder: Path,
    stacks: Collection[str] = (),
) -> dict:
    """Return the `quantization_config` of config.json.

    Args:
        packing: torchao's name of the order of four-bit codes.
        kept: modules that stay in bf16, though their kind is quantized.
        tables: the embedding and the output head, if they are in int8.
        eight: layers in int8, if the others have fewer bits.
        folder: of the full-precision model.
        stacks: stacks of experts, which have eight bits in every variant.
    """
    if spec.variant.bits == 4:
        kind = _recipe(
            "Int4WeightOnlyConfig",
            2,
            group_size=spec.group_size,
            int4_packing_format={"_type": "Int4PackingFormat", "_data": packing},
            int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
            int4_tile_packed_ntile=8,
            set_inductor_config=True,
        )
    elif spec.variant.rounds_inputs:
        kind = _recipe(
            DYNAMIC,
            2,
            act_mapping_type=_SYMMETRIC,
            granularity=_PER_ROW,
            reduce_range=False,
            set_inductor_config=True,
            weight_only_decode=False,
        )
    else:
        kind = _int8_recipe(spec.group_size)
    if tables or eight or stacks:
        in_eight = _int8_recipe(None)
        of_stacks = in_eight if spec.variant.bits == 4 else kind
        kinds = {**dict.fromkeys([*tables, *eight], in_eight), **dict.fromkeys(stacks, of_stacks), "_default": kind}
        kind = _recipe("FqnToConfig", 1, fqn_to_config=kinds, module_fqn_to_config=kinds)
    return described(kind, kept, tables, folder)


def described(kind: dict, kept: list[str], tables: list[str], folder: Path) -> dict:
    """Return the `quantization_config` of config.json with the settings `kind`.

    Args:
        kept: modules that stay in bf16, though their kind is quantized.
        tables: the embedding and the output head, if they are quantized.
        folder: of the full-precision model.
    """
    return {
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "modules_to_not_convert": kept if tables else skipped_modules(folder, kept),
        "include_input_output_embeddings": bool(tables),
        "untie_embedding_weights": False,
    }


def _int8_recipe(group_size: int | None) -> dict:
    granularity = _recipe("PerGroup", 1, group_size=group_size) if group_size else _PER_ROW
    return _recipe("Int8WeightOnlyConfig", 2, granularity=granularity, group_size=None, set_inductor_config=True)


_E4M3 = _dtype(torch.float8_e4m3fn)
_AUTO = {"_type": "KernelPreference", "_data": "AUTO"}
_PRODUCTS = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}


def float8_metadata(
    spec: VariantSpec,
    shapes: Mapping[str, tuple[int, ...]],
    plain: Iterable[str],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, str]:
    """Return the header's metadata of float8 weights, which is the same for every shard.

    Args:
        shapes: quantized weights: name -> shape (N, K).
        plain: names of the tensors that stay as they are.
        dtypes: the types that the quantized weights had, and compute as again.
    """
    inputs = {
        "float8_dtype": _E4M3,
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mm_config": None,
        "hp_value_lb": None,
        "hp_value_ub": None,
        "kernel_preference": _AUTO,
    }
    rounds_inputs = spec.variant.rounds_inputs
    entries = {name: json.dumps({"_type": "Tensor"}) for name in plain}
    for name, shape in shapes.items():
        data = {
            "block_size": [1, shape[-1]],
            "mm_config": {"_type": "Float8MMConfig", "_data": _PRODUCTS} if rounds_inputs else None,
            "act_quant_kwargs": {"_type": "QuantizeTensorToFloat8Kwargs", "_data": inputs} if rounds_inputs else None,
            "kernel_preference": _AUTO,
            "dtype": _dtype(dtypes[name]),
        }
        entries[name] = entry("Float8Tensor", data, "qdata", "scale")
    return {**entries, "tensor_names": json.dumps(list(entries))}


def float8_recipe(rounds_inputs: bool) -> dict:
    """Return the settings of float8 layers in config.json."""
    if not rounds_inputs:
        return _recipe("Float8WeightOnlyConfig", 2, weight_dtype=_E4M3, set_inductor_config=True, granularity=_PER_ROW)
    return _recipe(
        FLOAT8_DYNAMIC,
        2,
        activation_dtype=_E4M3,
        weight_dtype=_E4M3,
        granularity=[_PER_ROW, _PER_ROW],
        packing_format={"_type": "Float8PackingFormat", "_data": "PLAIN"},
        mm_config=_recipe("Float8MMConfig", 1, **_PRODUCTS),
        activation_value_lb=None,
        activation_value_ub=None,
        kernel_preference=_AUTO,
        set_inductor_config=True,
        alg_id=0,
    )
