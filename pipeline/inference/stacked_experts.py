"""Mixtures of experts, read by the names of the model: each stack is put together when it is asked for.

Codes of experts are dequantized, because transformers computes with a whole stack at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from pipeline.models.checkpoint import TensorInfo
from pipeline.models.experts import expert_places
from pipeline.models.tensor_names import names_in_model
from pipeline.quantization.formats import Format, StoredTensors

if TYPE_CHECKING:
    from pipeline.models.experts import ExpertPlace


class StackedExperts(Mapping[str, TensorInfo]):
    """The tensors of a mixture of experts by their names in the model.

    Attributes:
        plain_formats: quantized weights that are no experts, name -> format.
        are_stored: True if the checkpoint stores whole stacks of codes, which the stock loader keeps as they are.
    """

    def __init__(self, model: Any, checkpoint: StoredTensors, quantized: Mapping[str, Format]):
        self._checkpoint, self._quantized, self._dtype = checkpoint, quantized, model.dtype
        self._parts: dict[str, list[tuple[str, ExpertPlace]]] = {}
        for name, place in expert_places(model).items():
            self._parts.setdefault(place.stack, []).append((name, place))
        self._shapes = {stack: parts[0][1].stack_shape for stack, parts in self._parts.items()}
        self.are_stored = any(name in self._shapes for name in quantized)
        experts = {name for parts in self._parts.values() for name, _ in parts} | self._shapes.keys()
        self.plain_formats = {name: form for name, form in quantized.items() if name not in experts}
        coded = {part for name, form in quantized.items() if name in experts for part in form.part_names(name)}
        others = [name for name in checkpoint if name not in experts | coded]
        renamed = names_in_model(model, others)
        self._names = {renamed.get(name, name): name for name in others}
        there = checkpoint.keys() | quantized.keys()
        self._stacks = {s for s, parts in self._parts.items() if s in there or all(n in there for n, _ in parts)}

    def __getitem__(self, name: str) -> TensorInfo:
        if name in self._names:
            return self._checkpoint[self._names[name]]
        first, _ = self._parts[name][0]
        dtype = self._checkpoint[first].dtype if first in self._checkpoint else self._dtype
        return TensorInfo(dtype, self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._stacks

    def __len__(self) -> int:
        return len(self._names) + len(self._stacks)

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self._stacks

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor; that of a stack is (experts, rows, columns)."""
        if name in self._names:
            return self._checkpoint.read(self._names[name])
        shape = self._shapes[name]
        if name in self._quantized:
            return self._quantized[name].read(self._checkpoint, name, shape).dequantize(self._dtype).view(shape)
        rows, width = math.prod(shape[:-1]), shape[-1]
        result = torch.empty(rows, width, dtype=self[name].dtype)
        for part, place in self._parts[name]:
            form = self._quantized.get(part)
            stop = place.first_row + place.shape[0]
            result[place.first_row : stop] = (
                self._checkpoint.read(part)
                if form is None
                else form.read(self._checkpoint, part, place.shape).dequantize(self._dtype)
            )
        return result.view(shape)
