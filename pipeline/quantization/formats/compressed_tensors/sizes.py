"""What weights in compressed-tensors are stored as, part by part, and so how many bytes they take. Imports no torch.

It has no `table_bytes`: embeddings and output heads stay as they are.
"""

from __future__ import annotations

from pipeline.config.catalog import fitting_group_size
from pipeline.config.quantize import VariantSpec
from pipeline.config.registry import Variant
from pipeline.quantization.formats.torchao.sizes import Parts, parts_bytes, plain_bytes

__all__ = [
    "Parts",
    "is_dequantized_to_run",
    "is_packed",
    "layer_bytes",
    "packed_parts",
    "plain_bytes",
    "unpacked_parts",
]

NAMES = ("weight_packed", "weight", "weight_scale", "weight_shape", "input_scale")  # of all parts
SCALE = "bfloat16"
INPUTS: Parts = {"input_scale": (SCALE, (1,))}  # the part of layers whose inputs have a static scale


def is_dequantized_to_run(spec: VariantSpec, has_experts: bool) -> bool:
    """Return True for experts, for float8, and if inputs are rounded, which only stock transformers computes."""
    return has_experts or not is_packed(spec.variant)


def is_packed(variant: Variant) -> bool:
    """Return True if codes are packed into words: integers of layers that do not round their inputs."""
    return variant.values == "integer" and not variant.rounds_inputs


def packed_parts(shape: tuple[int, ...], bits: int, group_size: int) -> Parts:
    """Return the stored parts of a weight (N, K) with packed codes and `group_size` columns to a scale."""
    rows, width = shape
    words = -(-width * bits // 32)
    scales = (rows, width // group_size)
    return {
        "weight_packed": ("int32", (rows, words)),
        "weight_scale": (SCALE, scales),
        "weight_shape": ("int64", (2,)),
    }


def unpacked_parts(shape: tuple[int, ...], codes: str, group_size: int) -> Parts:
    """Return the stored parts of a weight (N, K) with codes of a dtype and `group_size` columns to a scale."""
    return {"weight": (codes, shape), "weight_scale": (SCALE, (shape[0], shape[1] // group_size))}


def layer_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> int:
    """Return the bytes of a layer's weight (N, K)."""
    group_size = (spec.group_size and fitting_group_size(shape[1], spec.group_size)) or shape[1]
    if is_packed(spec.variant):
        return parts_bytes(packed_parts(shape, spec.variant.bits, group_size))
    stored = unpacked_parts(shape, "float8_e4m3fn", group_size)  # integers of eight bits take as many
    return parts_bytes(stored | (INPUTS if spec.variant.static_inputs else {}))
