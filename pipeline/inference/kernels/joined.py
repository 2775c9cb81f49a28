"""Products of one input with several packed layers, joined into one.

A joined layer reads its weights from one block of memory. The single layers keep views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.inference.kernels.cpu import Int4Linear, Int8GroupLinear, Int8Linear, PackedLinear
from pipeline.inference.kernels.pages import Room

Product = Callable[[torch.Tensor], torch.Tensor]
_ALIGNMENT = 64  # bytes


def product(layers: Sequence[Any], dtype: torch.dtype, room: Room) -> Product:
    """Return x (T, K) -> x times the transposed weights of all `layers`, side by side (T, N); one product if possible.

    Packed layers that can be joined hold views of the joined weight afterwards, which lies in `room`.
    """
    if dtype == torch.bfloat16:
        kinds: tuple[tuple[type, Any], ...] = ((Int8Linear, JoinedInt8), (Int4Linear, JoinedInt4))
        for kind, joined in kinds:
            if all(type(layer) is kind for layer in layers) and joined.suits(layers):
                return joined(layers, room)
    return layers[0].forward if len(layers) == 1 else Separate(layers)


class Separate:
    """Layers that have no joined product."""

    def __init__(self, layers: Sequence[Any]):
        self.layers = list(layers)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the products with the inputs x (T, K), side by side: (T, N)."""
        return torch.cat([layer.forward(x) for layer in self.layers], dim=-1)


def read_tensors(layer: PackedLinear) -> list[torch.Tensor]:
    """Return the tensors of a packed layer that are read at every token."""
    if isinstance(layer, Int4Linear):
        return [layer.packed, layer.scale_and_zero]
    assert isinstance(layer, (Int8Linear, Int8GroupLinear))
    return [layer.codes]


def addresses(layers: Sequence[PackedLinear]) -> list[int]:
    """Return the memory addresses of the tensors that are read at every token."""
    return [tensor.data_ptr() for layer in layers for tensor in read_tensors(layer)]


def _biases(layers: Sequence[PackedLinear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros(n.out_features) if n.bias is None else n.bias.float() for n in layers]).bfloat16()


class JoinedInt8:
    """`Int8Linear` layers of the same inputs as one, for bf16."""

    @staticmethod
    def suits(layers: Sequence[Int8Linear]) -> bool:
        """Return True if the codes of every layer stay aligned when they are joined."""
        return all(layer.codes.numel() % _ALIGNMENT == 0 for layer in layers[:-1])

    def __init__(self, layers: Sequence[Int8Linear], room: Room):
        self.codes = room.cat([layer.codes for layer in layers])
        self.scale = torch.cat([layer.scale for layer in layers]).bfloat16()
        self.bias = _biases(layers)
        for layer, codes in zip(layers, self.codes.split([n.out_features for n in layers]), strict=True):
            layer.codes = codes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the products with the inputs x (T, K), side by side: (T, N)."""
        y = torch._weight_int8pack_mm(x, self.codes, self.scale)
        return y if self.bias is None else y.add_(self.bias)


class JoinedInt4:
    """`Int4Linear` layers of the same inputs as one, for bf16."""

    @staticmethod
    def suits(layers: Sequence[Int4Linear]) -> bool:
        """Return True if no layer has padded rows, and all have the same group size and type of scales."""
        whole = all(layer.out_features == len(layer.packed) for layer in layers)
        return whole and len({(layer.grid.group_size, layer.grid.scale_dtype) for layer in layers}) == 1

    def __init__(self, layers: Sequence[Int4Linear], room: Room):
        self.group_size, self.bias = layers[0].grid.group_size, _biases(layers)
        rows = [layer.out_features for layer in layers]
        self.packed = room.cat([layer.packed for layer in layers])
        stored = room.cat([layer.scale_and_zero for layer in layers], dim=1)
        parts = zip(layers, self.packed.split(rows), stored.split(rows, dim=1), strict=True)
        for layer, packed, scale_and_zero in parts:
            layer.packed, layer.scale_and_zero = packed, scale_and_zero
        self.scale_and_zero = stored.bfloat16()  # the same tensor, unless scales are stored in another type

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the products with the inputs x (T, K), side by side: (T, N)."""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, self.packed, self.group_size, self.scale_and_zero)
        return y if self.bias is None else y.add_(self.bias)
