"""Products of many rows that models compute outside their linear layers, such as attention and experts.

On a CPU without fast products for the type of the model they are computed in float32, whatever the architecture.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.inference.kernels.products import FEW_ROWS, many_rows, product_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEFT_OPERAND = {  # of each function that multiplies: the place and the name of the argument that has the rows
    functional.linear: (0, "input"),
    functional.scaled_dot_product_attention: (0, "query"),
    torch.matmul: (0, "input"), torch.Tensor.matmul: (0, "self"), torch.Tensor.__matmul__: (0, "self"),
    torch.mm: (0, "input"), torch.Tensor.mm: (0, "self"), torch.bmm: (0, "input"), torch.Tensor.bmm: (0, "self"),
    torch.addmm: (1, "mat1"), torch.Tensor.addmm: (1, "mat1"),
    torch.baddbmm: (1, "batch1"), torch.Tensor.baddbmm: (1, "batch1"),
    torch._grouped_mm: (0, "input"),
}  # fmt: skip


class Float32Products(TorchFunctionMode):
    """While it is entered, products of many rows in half precision are computed in float32, if that is faster here.

    Inputs are converted, and the result is converted back once. Products on other devices are not changed.
    """

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        options = options or {}
        if function not in _LEFT_OPERAND or "out" in options:
            return function(*arguments, **options)
        place, name = _LEFT_OPERAND[function]
        left: Any = arguments[place] if place < len(arguments) else options.get(name)
        if not _is_slow(left):
            return function(*arguments, **options)
        values = [*arguments, *options.values()]
        needs_gradient = torch.is_grad_enabled() and any(getattr(v, "requires_grad", False) for v in values)
        if function is torch._grouped_mm and not needs_gradient:
            return _grouped(*arguments, **options)
        if function is functional.linear and not needs_gradient:
            return _linear(*arguments, **options)
        exact = [_exact(value) for value in arguments]
        result = function(*exact, **{name: _exact(value) for name, value in options.items()})
        return result.to(left.dtype)


def _is_slow(x: object) -> bool:
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.ndim < 2:
        return False
    return x.shape[-2] > FEW_ROWS and product_dtype(x.dtype) != x.dtype


def _exact(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):  # of a quantization library, which multiplies itself
        return functional.linear(x, weight, bias)
    return many_rows(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, **_: object) -> torch.Tensor:
    """Return the rows of x (T, K) up to each offset times the matrix of that group in weight (G, K, N): (T, N)."""
    y, first = x.new_zeros(len(x), weight.shape[2]), 0
    for last, matrix in zip(offs.tolist(), weight, strict=True):
        multiply = functional.linear if last - first <= FEW_ROWS else many_rows
        y[first:last] = multiply(x[first:last], matrix.T)
        first = last
    return y


def quicken_products(model: PreTrainedModel) -> None:
    """Let the decoder of a model that computes on a CPU read many tokens in `Float32Products`, if it needs that.

    A step of few tokens is computed as it is.
    """
    if product_dtype(model.dtype) == model.dtype:
        return
    entered = threading.local()

    def enter(module: torch.nn.Module, arguments: tuple, options: dict) -> None:
        given = arguments[0] if arguments else options.get("input_ids")
        given = options["inputs_embeds"][..., 0] if given is None else given
        mode = Float32Products() if given.numel() > FEW_ROWS else contextlib.nullcontext()
        entered.modes = [*getattr(entered, "modes", ()), mode]
        mode.__enter__()

    def leave(*_: object) -> None:
        entered.modes.pop().__exit__(None, None, None)

    model.base_model.register_forward_pre_hook(enter, with_kwargs=True)
    model.base_model.register_forward_hook(leave, always_call=True)
