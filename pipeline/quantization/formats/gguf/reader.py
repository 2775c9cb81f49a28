"""The weights of a GGUF file by their names in the checkpoint that it was made of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import TensorInfo
from pipeline.models.checkpoint.row_blocks import tiles
from pipeline.models.experts import expert_number, is_expert
from pipeline.models.gguf_metadata import read_header
from pipeline.quantization.formats.gguf.blocks import PLAIN
from pipeline.quantization.formats.gguf.names import architecture_named, as_in_checkpoint, library, stored_names


class GgufWeights(Mapping[str, TensorInfo]):
    """The tensors of a file, read one by one and dequantized; no page of it stays mapped.

    A mapping from the names in the checkpoint to `TensorInfo`. Quantized tensors have the type `dtype`.
    """

    def __init__(self, path: Path, names: Iterable[str], dtype: torch.dtype):
        """Open a file that was made of a checkpoint with tensors of these names.

        Raises:
            CheckpointError: if it is damaged, or has other tensors.
            MissingExtra: if the package `gguf` is not installed.
        """
        found = read_header(path)
        self.path, self.dtype = path, dtype
        kind = str(found.keys.get("general.architecture"))
        self._of = architecture_named(kind)
        head_dim, layers = (found.keys.get(f"{kind}.{key}") for key in ("attention.key_length", "block_count"))
        if not isinstance(head_dim, int) or not isinstance(layers, int):
            raise CheckpointError(f"{path}: has no size of heads or no number of layers")
        self._head_dim, stored = head_dim, found.tensors
        wanted = stored_names(self._of, layers, names)
        if missing := sorted(set(wanted.values()) - stored.keys()):
            raise CheckpointError(f"{path}: has no {missing[0]!r}; make it again")
        self._places = {name: stored[target] for name, target in wanted.items()}
        for name, place in self._places.items():
            if is_expert(name) and (len(place.shape) != 3 or expert_number(name) >= place.shape[0]):
                raise CheckpointError(f"{path}: {wanted[name]!r} has no place for {name!r}; make it again")

    def __getitem__(self, name: str) -> TensorInfo:
        place = self._places[name]
        return TensorInfo(PLAIN.get(place.kind, self.dtype), place.shape[1:] if is_expert(name) else place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor, dequantized."""
        gguf, place = library(), self._places[name]
        kind, shape, offset = place.kind, self[name].shape, place.offset
        code = gguf.GGMLQuantizationType[kind]
        rows, width = shape[0], math.prod(shape[1:])
        (row_bytes,) = gguf.quants.quant_shape_to_byte_shape((width,), code)
        if is_expert(name):
            offset += expert_number(name) * rows * row_bytes
        result = torch.empty(rows, width, dtype=self[name].dtype)
        for first, stop in tiles(rows, width):
            data = _read(self.path, offset + first * row_bytes, (stop - first) * row_bytes)
            if kind in PLAIN:
                result[first:stop] = torch.from_numpy(data).view(PLAIN[kind]).view(-1, width)
            else:
                numbers = gguf.quants.dequantize(data.reshape(-1, row_bytes), code)
                result[first:stop] = torch.from_numpy(numbers)
        return as_in_checkpoint(self._of, name, result.view(shape), self._head_dim)


def _read(path: Path, offset: int, count: int) -> np.ndarray:
    data = np.empty(count, dtype=np.uint8)
    view, done = memoryview(cast(Any, data)), 0  # no `Buffer` before Python 3.12
    try:
        with open(path, "rb", buffering=0) as file:
            while done < count:
                got = os.preadv(file.fileno(), [view[done:]], offset + done)
                if not got:
                    raise CheckpointError(f"{path}: ended before its last tensor; make it again")
                done += got
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return data
