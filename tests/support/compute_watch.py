"""A watch on the matrix products of torch: their types and numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MANY_ROWS = 16  # a product of more rows counts
LEAST_WORK = 1 << 14  # multiplications; a smaller product, such as that of rotary tables, costs nothing in any type

# Of each function that multiplies: which argument has the rows, and which side of the next one is the result's width.
_PRODUCTS = {
    "mm": (0, -1), "bmm": (0, -1), "matmul": (0, -1), "addmm": (1, -1), "baddbmm": (1, -1), "_grouped_mm": (0, -1),
    "grouped_mm_fallback": (0, -1), "linear": (0, 0), "_linear_pointwise": (0, 0), "mkldnn_linear": (0, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """One product: the function that computed it, the type of its inputs, its rows and its multiplications."""

    function: str
    dtype: torch.dtype
    rows: int
    work: int


class BF16Products(TorchDispatchMode):
    """Records every product of bfloat16 or float16 inputs on a CPU while it is entered: of forward and backward passes.

        with BF16Products() as seen:
            step()
        assert not seen.many_rows

    The kernels of packed int8 and int4 weights are not among them: they convert their inputs themselves.
    """

    def __init__(self):
        super().__init__()
        self.products: list[Product] = []

    @property
    def many_rows(self) -> list[Product]:
        """The products of more than `MANY_ROWS` rows that are large enough to cost time."""
        return [p for p in self.products if p.rows > MANY_ROWS and p.work >= LEAST_WORK]

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
            self._see(name, arguments[0], arguments[1].shape[-2])
        elif name.startswith("_scaled_dot_product"):
            self._see(name, arguments[1], arguments[2].shape[-2])  # the gradient comes first
        elif name in _PRODUCTS:
            left, side = _PRODUCTS[name]
            self._see(name, arguments[left], arguments[left + 1].shape[side])
        return function(*arguments, **(options or {}))

    def _see(self, name: str, left: torch.Tensor, width: int) -> None:
        if left.dtype in (torch.bfloat16, torch.float16) and left.device.type == "cpu":
            rows = left.shape[-2] if name.startswith("_scaled") or "bmm" in name else left.numel() // left.shape[-1]
            self.products.append(Product(name, left.dtype, rows, left.numel() * width))
