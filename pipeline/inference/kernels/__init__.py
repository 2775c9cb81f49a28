"""Fast layers for loaded models: portable codes, packed for this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.inference.kernels import cpu, cuda
from pipeline.inference.kernels.attention import quicken_attention
from pipeline.inference.kernels.float32_mode import quicken_products
from pipeline.inference.kernels.plain import quicken_linears
from pipeline.inference.kernels.rounded import correct_rounded
from pipeline.inference.kernels.step import quicken_decoding
from pipeline.quantization.grid import GroupQuantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quicken(model: PreTrainedModel) -> None:
    """Make a model on a CPU use the fastest products, attention and decoding. Its saved files stay the same."""
    quicken_linears(model)
    correct_rounded(model)
    quicken_attention(model)
    quicken_products(model)
    quicken_decoding(model)


def runs_as_stored(weight: GroupQuantized, device: torch.device) -> bool:
    """Return True if the tensor of the stock loader is the fastest kernel already, as for int8 on CUDA."""
    return device.type == "cuda" and weight.grid.bits == 8


def linear(weight: GroupQuantized, bias: torch.Tensor | None, device: torch.device) -> torch.nn.Module | None:
    """Return a linear layer that computes with `weight` on `device`; None if no kernel exists for it."""
    if device.type == "cpu":
        return cpu.linear(weight, bias)
    if device.type == "cuda":
        return cuda.linear(weight, bias, device)
    return None
