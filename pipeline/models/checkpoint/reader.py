"""Reading tensors of a checkpoint into memory, whole or in blocks of rows; no file is mapped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint.header import INDEX_NAME, SINGLE_NAME, TensorInfo, once_each, read_header

_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a folder with `model.safetensors`, or with shards and their index.

    A mapping from tensor name to `TensorInfo`; `read` and `read_rows` bring the bytes,
    from any number of threads.
    """

    def __init__(self, folder: str | Path):
        self._open(shard_files(Path(folder), Path.is_file))

    @classmethod
    def of_files(cls, paths: list[Path]) -> Checkpoint:
        """Return the tensors of safetensors files with any names, such as an adapter's."""
        checkpoint = cls.__new__(cls)
        checkpoint._open({path: set() for path in paths})
        return checkpoint

    def _open(self, shards: Mapping[Path, set[str]], read: Callable[[Path], tuple] = read_header) -> None:
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for path, expected in shards.items():
            tensors, metadata = read(path)
            missing = expected - set(tensors)
            if missing:
                raise CheckpointError(f"{path}: {sorted(missing)[0]!r} is in the index and not in the shard")
            twice = self._tensors.keys() & tensors.keys()
            if twice:
                raise CheckpointError(f"{path}: {sorted(twice)[0]!r} is in two shards")
            self._tensors.update(tensors)
            self.metadata.update(metadata)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names: name until now -> new name."""
        self._tensors = {names.get(name, name): info for name, info in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors together in bytes."""
        return sum(info.nbytes for info in self.values())

    def abandon(self) -> None:
        """Release threads that wait for bytes; all files are here, so there are none."""

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor in memory of its own."""
        info = self[name]
        return self._bytes(info, info.offset, info.nbytes).view(info.dtype).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of a tensor, shape (stop - start, ...)."""
        info = self[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"{name}: rows {start} to {stop} of {info.shape}")
        data = self._bytes(info, info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)
        return data.view(info.dtype).reshape(stop - start, *info.shape[1:])

    def _bytes(self, info: TensorInfo, offset: int, count: int) -> torch.Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        try:
            file = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < count:
                    got = os.preadv(file, [view[done:]], offset + done)
                    if not got:
                        raise CheckpointError(f"{info.path}: ended before its last tensor; fetch it again")
                    done += got
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"{info.path}: cannot be read ({error.strerror})") from None
        return data


def shard_files(folder: Path, is_there: Callable[[Path], bool]) -> dict[Path, set[str]]:
    """Return the files of a checkpoint, each with the tensors that the index in `folder` expects in it."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if is_there(single):  # before an index that lies there too, as transformers has it
        return {single: set()}
    if not index.is_file():
        raise CheckpointError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}; other formats are not read")
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once_each)
        pairs = [(str(name), str(file)) for name, file in content["weight_map"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: not an index with a weight_map, or one with a name twice") from None
    shards: dict[Path, set[str]] = {}
    for name, file in pairs:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file!r} is not the name of a file in this folder")
        shards.setdefault(folder / file, set()).add(name)
    for path in sorted({*shards, *_counted(shards)}):
        if not is_there(path):
            raise CheckpointError(f"{path}: named by the index, and missing")
        if path not in shards:
            raise CheckpointError(f"{index}: does not name {path.name}, one of the shards that belong together")
    return shards


def _counted(shards: Mapping[Path, set[str]]) -> set[Path]:
    """Return every file whose existence follows from numbers such as in `model-00001-of-00005.safetensors`."""
    found = set()
    for path in shards:
        if (match := _NUMBERED.fullmatch(path.name)) and len(match[3]) <= 5:
            stem, digits, count = match[1], len(match[2]), int(match[3])
            found |= {path.with_name(f"{stem}-{i:0{digits}d}-of-{match[3]}.safetensors") for i in range(1, count + 1)}
    return found
