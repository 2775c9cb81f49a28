"""Writing tensors into shards that are planned before the first byte and named after the last."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint.header import DTYPE_NAMES, INDEX_NAME, SHARD_BYTES, SINGLE_NAME, TensorInfo
from pipeline.models.checkpoint.placing import is_covered, put
from pipeline.system.files import write_json

_PYTORCH = {"format": "pt"}


class CheckpointWriter:
    """A writer of tensors, whole or in rows, in any order and from any number of threads.

    Args:
        folder: made if missing. Files get their final names only when every byte is there
            and on the disk; after an error nothing of them is left.
        plan: name -> (dtype, shape) of every tensor that will be written.
        metadata: goes whole into every shard, as transformers needs it for torchao.
        shard_bytes: size over which a new shard is begun.

    Use as a context manager: leaving it checks that every byte came, and syncs.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._written: dict[str, list[tuple[int, int]]] = {}
        self._places: dict[str, TensorInfo] = {}
        self._files: dict[Path, int] = {}  # final path -> descriptor of the file that will have that name
        shards = _distribute(plan, shard_bytes)
        names = [SINGLE_NAME]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        try:
            for file_name, tensors in zip(names, shards, strict=True):
                self._start(self.folder / file_name, tensors, {**_PYTORCH, **(metadata or {})})
        except BaseException:
            self._discard()
            raise

    def _start(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        text, starts = _header(tensors, metadata)
        for name, start in starts.items():
            info = tensors[name]
            self._places[name] = TensorInfo(info.dtype, info.shape, path, 8 + len(text) + start)
            self._written[name] = []
        try:
            self._files[path] = os.open(_partial(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
        put(self._files[path], struct.pack("<Q", len(text)) + text, 0, path)

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Write `tensor` to its place: all of it, or the rows from `first_row` on.

        Rows of a stack (E, N, K) may come as a matrix; they are then counted through the whole stack.
        """
        place, row_bytes = self._places[name], self._places[name].row_bytes
        fits = tensor.ndim == len(place.shape) and tuple(tensor.shape[1:]) == place.shape[1:]
        if tensor.ndim == 2 and len(place.shape) == 3:
            fits, row_bytes = tensor.shape[1] == place.shape[2], row_bytes // place.shape[1]
        if tensor.dtype != place.dtype or not fits:
            raise ValueError(f"{name}: planned as {place.dtype} {place.shape}, got {tensor.dtype} {tensor.shape}")
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        start = first_row * row_bytes
        if start < 0 or start + len(data) > place.nbytes:
            raise ValueError(f"{name}: rows from {first_row} on do not fit into {place.shape}")
        put(self._files[place.path], data, place.offset + start, place.path)
        self._written[name].append((start, start + len(data)))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        unfinished = [name for name, place in self._places.items() if not is_covered(self._written[name], place.nbytes)]
        if unfinished:
            raise ValueError(f"{self.folder}: {len(unfinished)} tensors unfinished, first {unfinished[0]}")
        try:
            for descriptor in self._files.values():
                os.fsync(descriptor)
            # A checkpoint left here by an earlier write would be read instead of this one, or beside it.
            for old in (INDEX_NAME, SINGLE_NAME):
                (self.folder / old).unlink(missing_ok=True)
            for path, descriptor in self._files.items():
                os.close(descriptor)
                self._files[path] = -1
                os.replace(_partial(path), path)
            if len(self._files) > 1:
                self._write_index()
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written ({error.strerror})") from None

    def _write_index(self) -> None:
        total = sum(info.nbytes for info in self._places.values())
        weight_map = {name: info.path.name for name, info in sorted(self._places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.folder / INDEX_NAME, index)

    def _discard(self) -> None:
        """Close open files, and remove those that never got their names."""
        for path, descriptor in self._files.items():
            with contextlib.suppress(OSError):
                if descriptor >= 0:
                    os.close(descriptor)
                _partial(path).unlink(missing_ok=True)
            self._files[path] = -1


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def file_bytes(
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Return the bytes of all files, headers included, that a `CheckpointWriter` with these arguments writes."""
    count = 0
    for tensors in _distribute(plan, shard_bytes):
        text, _ = _header(tensors, {**_PYTORCH, **(metadata or {})})
        count += 8 + len(text) + sum(info.nbytes for info in tensors.values())
    return count


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header of one file, and the start of each tensor behind it, in the order of the file."""
    # Wide types first, so that every tensor begins at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    starts, position = {}, 0
    for name, info in ordered:
        offsets = [position, position + info.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        starts[name], position = offsets
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), starts


def _distribute(plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[dict[str, TensorInfo]]:
    """Return the tensors of each shard in the plan's order, with at most `limit` bytes in a shard of several."""
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, (dtype, shape) in plan.items():
        info = TensorInfo(dtype, tuple(shape))
        if shards[-1] and filled + info.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    return shards
