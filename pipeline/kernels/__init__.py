"""The fast linear layers that loading puts in: portable codes, packed for this machine."""

from __future__ import annotations

import torch

from pipeline.kernels import cpu, cuda
from pipeline.quantization.grid import GroupQuantized


def runs_as_stored(weight: GroupQuantized, device: torch.device) -> bool:
    """Is the tensor that the stock loader made already the right kernel? So it is for int8 on CUDA."""
    return device.type == "cuda" and weight.grid.bits == 8


def linear(weight: GroupQuantized, bias: torch.Tensor | None, device: torch.device) -> torch.nn.Module | None:
    """A linear layer that computes with `weight` on `device`; None where there is no kernel for it."""
    if device.type == "cpu":
        return cpu.linear(weight, bias)
    if device.type == "cuda":
        return cuda.linear(weight, bias, device)
    return None
