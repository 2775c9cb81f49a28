"""How compressed-tensors describes quantized weights: in the `quantization_config` of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.registry import Variant
from pipeline.models.matrices import gate_modules, head_modules
from pipeline.quantization.formats.compressed_tensors.sizes import is_packed
from pipeline.quantization.formats.safetensors import Grids

VERSION = "0.15.0"  # of compressed-tensors, the oldest that transformers takes


def quantization_config(variant: Variant, kept: list[str], grids: Grids, folder: Path) -> dict:
    """Return the `quantization_config` of config.json.

    One group of settings holds for all linear layers. With several, stock transformers would dequantize layers wrongly
    if it is asked to, and vLLM would take the wrong one for layers that it fuses.

    Args:
        kept: modules that stay in bf16.
        grids: the shape and the grid of each quantized weight.
        folder: of the full-precision model.
    """
    (group_size,) = {grid.group_size for _, grid in grids.values()}
    storage = _format(variant)
    group = {
        "targets": ["Linear"],
        "weights": _codes(variant, group_size),
        "input_activations": _inputs(variant),
        "output_activations": None,
        "format": storage,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*head_modules(folder), *gate_modules(folder), *kept],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def _format(variant: Variant) -> str:
    if is_packed(variant):
        return "pack-quantized"
    return "int-quantized" if variant.values == "integer" else "float-quantized"


def _codes(variant: Variant, group_size: int | None) -> dict[str, Any]:
    """Return the description of the codes of weights."""
    return {
        "num_bits": variant.bits,
        "type": _type(variant),
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "symmetric": True,
        "dynamic": False,
    }


def _inputs(variant: Variant) -> dict[str, Any] | None:
    """Return the description of the codes of inputs; None if they are not rounded."""
    if not variant.rounds_inputs:
        return None
    static = variant.static_inputs
    strategy = "tensor" if static else "token"
    return {"num_bits": 8, "type": _type(variant), "strategy": strategy, "symmetric": True, "dynamic": not static}


def _type(variant: Variant) -> str:
    return "int" if variant.values == "integer" else "float"
