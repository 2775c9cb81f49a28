"""The fast linear layers that loading puts in: portable codes, packed for this machine."""

from __future__ import annotations

import torch

from pipeline.kernels import cpu, cuda
from pipeline.quantization.grid import GroupQuantized


def linear(weight: GroupQuantized, bias: torch.Tensor | None, device: torch.device) -> torch.nn.Module | None:
    """A linear layer that computes with `weight` on `device`; None where there is no kernel for it."""
    if device.type == "cpu":
        return cpu.linear(weight, bias)
    if device.type == "cuda":
        return cuda.linear(weight, bias, device)
    return None


def runs_as_loaded(weight: GroupQuantized, device: torch.device) -> bool:
    """Whether torchao's own tensor is what runs best on `device`: int8 on CUDA. It stays as it was loaded."""
    return device.type == "cuda" and weight.grid.bits == 8
