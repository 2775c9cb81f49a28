"""A layer of a cache whose keys and values have room to grow, so that a new token does not copy all earlier ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST_ROOM = 256  # positions


class GrowingLayer(DynamicLayer):
    """What transformers' `DynamicLayer` is, but `keys` and `values` (B, H, L, D) are views of a longer tensor.

    Whatever assigns other tensors to `keys` and `values` (cropping, reordering, repeating) may do so: the next update
    copies them to a new room. So a view that somebody keeps is never overwritten.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _keys: torch.Tensor
    _values: torch.Tensor
    _shown: torch.Tensor | None = None  # the keys that `show` set last
    _room: torch.Tensor | None = None  # (B, 2 H, capacity, D): first all keys, then all values

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """Return a layer with the keys and values of `layer`, which is initialized."""
        new = cls()
        new.device, new.is_initialized = layer.device, True
        assert layer.keys is not None and layer.values is not None
        new.keys, new.values = layer.keys, layer.values
        return new

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values (B, H, T, D) behind the others; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        alike = key_states.shape == value_states.shape and key_states.dtype == value_states.dtype
        if not alike or torch.is_grad_enabled() or key_states.shape[:2] != self.keys.shape[:2]:
            return super().update(key_states, value_states, *args, **kwargs)  # at first `keys` is an empty vector
        start, count = self.keys.shape[2], key_states.shape[2]
        self.make_room(count)
        for part, states in ((self._keys, key_states), (self._values, value_states)):
            part.narrow(2, start, count).copy_(states)
        return self.show(start + count)

    def make_room(self, count: int) -> None:
        """Have room for `count` more positions, in a tensor that nobody else writes to."""
        keys, room = self.keys, self._room
        length = keys.shape[2]
        if (
            room is not None
            and keys is self._shown
            and length + count <= room.shape[2]
            and (torch.is_inference_mode_enabled() or not room.is_inference())
        ):
            return
        batch, heads, _, width = keys.shape
        capacity = length + count + max(_LEAST_ROOM, length // 4)
        self._room = room = keys.new_empty(batch, 2 * heads, capacity, width)
        self._keys, self._values = room[:, :heads], room[:, heads:]
        self._keys.narrow(2, 0, length).copy_(keys)
        self._values.narrow(2, 0, length).copy_(self.values)
        self.show(length)

    def append(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values (B, 2 H, D) of one position, which there is room for; return all of them."""
        length = self.keys.shape[2]
        assert self._room is not None, "make_room comes first"
        self._room.select(2, length).copy_(states)
        return self.show(length + 1)

    def show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Set `keys` and `values` to the first `length` positions, and return them."""
        self.keys = self._shown = self._keys.narrow(2, 0, length)
        self.values = self._values.narrow(2, 0, length)
        return self.keys, self.values


def growing(cache: object, layers: int, batch: int) -> list[GrowingLayer] | None:
    """Return the first layers of a cache, made able to grow; None if it is another kind of cache, or is empty."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or len(cache.layers) < layers:
        return None
    found: list[Any] = cache.layers[:layers]
    for number, layer in enumerate(found):
        keys, values = layer.keys, layer.values
        if layer.__class__ is not GrowingLayer:
            if layer.__class__ is not DynamicLayer or not layer.is_initialized or keys.dim() != 4:
                return None
            if keys.shape != values.shape or keys.shape[0] != batch:
                return None
            found[number] = cache.layers[number] = GrowingLayer.of(layer)
        elif not layer.is_initialized or keys.dim() != 4:
            return None
    return found
