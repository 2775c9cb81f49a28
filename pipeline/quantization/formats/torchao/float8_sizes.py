"""What torchao's float8 tensors are stored as, part by part, and so how many bytes they take. Imports no torch.

It has no `table_bytes`: embeddings and output heads stay as they are.
"""

from __future__ import annotations

from pipeline.config.quantize import VariantSpec
from pipeline.quantization.formats.torchao.sizes import Parts, parts_bytes, plain_bytes

__all__ = ["is_dequantized_to_run", "layer_bytes", "parts", "plain_bytes"]


def is_dequantized_to_run(spec: VariantSpec, has_experts: bool) -> bool:
    """Return True unless inputs are rounded, which torchao computes with the codes."""
    return not spec.variant.rounds_inputs


def parts(shape: tuple[int, ...]) -> Parts:
    """Return the stored parts of a weight (N, K)."""
    return {"qdata": ("float8_e4m3fn", shape), "scale": ("float32", (shape[0], 1))}


def layer_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> int:
    """Return the bytes of a layer's weight (N, K)."""
    return parts_bytes(parts(shape))
