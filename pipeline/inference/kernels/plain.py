"""Ordinary linear layers on a CPU, computed in the way that is fastest there.

They keep their weights in the type in which these are stored. One token takes the time of reading the weights, so it
is multiplied in that type. Many rows are arithmetic, and are multiplied in the machine's compute type.
"""

from __future__ import annotations

import threading

import torch

from pipeline.inference.kernels.products import FEW_ROWS, many_rows, product_dtype


class PlainLinear(torch.nn.Linear):
    """A linear layer with the parameters, the state dict and the results of `torch.nn.Linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., K) times the transposed weight, plus the bias: (..., N)."""
        if x.numel() == self.in_features:
            return self._one_row(x)
        if x.numel() <= FEW_ROWS * self.in_features or x.dtype != self.weight.dtype or x.device.type != "cpu":
            return super().forward(x)
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if needs_gradient or product_dtype(x.dtype) != torch.float32:
            return super().forward(x)
        y = many_rows(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _one_row(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with one row, which oneDNN computes in up to twice the time of torch's own function.

        torch turns to its own only if oneDNN is off for the whole process, so another thread must not be computing.
        """
        if not torch.backends.mkldnn.enabled or threading.active_count() > 1:
            return super().forward(x)
        torch._C._set_mkldnn_enabled(False)
        try:
            return super().forward(x)
        finally:
            torch._C._set_mkldnn_enabled(True)


def quicken_linears(model: torch.nn.Module) -> None:
    """Make every ordinary linear layer of a model that computes on a CPU a `PlainLinear`.

    The layer object stays the same, so ties, hooks and names do too. A layer whose weight is a tensor of a
    quantization library is not changed.
    """
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and type(layer.weight.data) is torch.Tensor:
            layer.__class__ = PlainLinear
