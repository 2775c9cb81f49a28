"""int8 layers that also round what they are given, on CPUs whose int8 products torch computes wrongly.

torchao multiplies the rounded input and the codes as int8. Without VNNI instructions oneDNN adds pairs of products in
16 bits, where they saturate: on such a CPU a model's logits were off by a sixth. In float32 the same sums are exact
up to rounding.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch

from pipeline.inference.kernels.products import float32_product, row_blocks


@cache
def int8_products_are_exact() -> bool:
    """Return True if torch's product of int8 matrices is right on this CPU, for the largest numbers there are."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 64 * 127 * 127).all())


def correct_rounded(model: torch.nn.Module) -> None:
    """Let layers on a CPU that round their input multiply in float32 if the int8 products of torch are wrong there."""
    for layer in model.modules():
        rounds = getattr(getattr(layer, "weight", None), "act_quant_kwargs", None) is not None
        if rounds and isinstance(layer, torch.nn.Linear) and not int8_products_are_exact():
            layer.__dict__["forward"] = MethodType(_forward, layer)


def _forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Compute what the layer of torchao does: rounded x (..., K) times transposed codes (N, K), scaled, plus bias."""
    from torchao.quantization import Int8Tensor

    weight: Any = layer.weight  # a tensor of torchao
    how = weight.act_quant_kwargs
    rounded = Int8Tensor.from_hp(x, how.granularity, mapping_type=how.mapping_type, reduce_range=how.reduce_range)
    flat = rounded.qdata.reshape(-1, x.shape[-1]).float()
    parts = [float32_product(flat, weight.qdata[rows].float()) for rows in row_blocks(*weight.qdata.shape)]
    y = torch.cat(parts, -1) * rounded.scale.reshape(-1, 1).float() * weight.scale.flatten().float()
    y = y.view(*x.shape[:-1], -1)
    return (y if layer.bias is None else y + layer.bias).to(x.dtype)
