"""Sharded safetensors, read by byte ranges and written piece by piece.

Neither side maps a file or holds a shard: a tensor is read whole or in blocks of
rows, and an output's headers are planned before its first byte is written, so that
every piece has its place. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
SHARD_BYTES = 4_900_000_000  # of tensors; with its header a file stays below 5 GB

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor: `dtype`, `shape`, and where its bytes lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path | None = None
    offset: int = 0  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: where the header is not one, or offsets overlap, leave gaps, or
            disagree with a shape or with the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short")
            header = json.loads(file.read(length), object_pairs_hook=_once_each)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} stands twice in the header") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the metadata is not a table of strings")
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, end = entry["data_offsets"]
            sound = isinstance(entry["shape"], list) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: the entry of {name!r} is malformed or of an unknown type") from None
        info = TensorInfo(dtype, shape, path, 8 + length + start if sound else 0)
        if not sound or end - start != info.nbytes:
            raise CheckpointError(f"{path}: {name!r} has a shape and a length that disagree")
        tensors[name] = info
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise CheckpointError(f"{path}: {name!r} overlaps its neighbour or leaves a gap")
        position = end
    if 8 + length + position != size:
        raise CheckpointError(f"{path}: {size} bytes where its header says {8 + length + position}; fetch it again")
    return tensors, metadata


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return table


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a folder with `model.safetensors`, or with shards and their index.

    A mapping from tensor name to `TensorInfo`; `read` and `read_rows` bring the bytes.
    """

    def __init__(self, folder: str | Path):
        self._open(self._shards(Path(folder)))

    @classmethod
    def of_files(cls, paths: list[Path]) -> Checkpoint:
        """The tensors of safetensors files by any name, such as an adapter's."""
        checkpoint = cls.__new__(cls)
        checkpoint._open({path: set() for path in paths})
        return checkpoint

    def _open(self, shards: dict[Path, set[str]]) -> None:
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for path, expected in shards.items():
            tensors, metadata = read_header(path)
            missing = expected - set(tensors)
            if missing:
                raise CheckpointError(f"{path}: {sorted(missing)[0]!r} is in the index and not in the shard")
            twice = self._tensors.keys() & tensors.keys()
            if twice:
                raise CheckpointError(f"{path}: {sorted(twice)[0]!r} is in two shards")
            self._tensors.update(tensors)
            self.metadata.update(metadata)

    @staticmethod
    def _shards(folder: Path) -> dict[Path, set[str]]:
        index, single = folder / INDEX_NAME, folder / SINGLE_NAME
        if single.is_file():  # before an index that lies there too, as transformers has it
            return {single: set()}
        if not index.is_file():
            raise CheckpointError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}; other formats are not read")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            pairs = [(str(name), str(file)) for name, file in weight_map.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{index}: not an index with a weight_map") from None
        shards: dict[Path, set[str]] = {}
        for name, file in pairs:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {file!r} is not the name of a file in this folder")
            shards.setdefault(folder / file, set()).add(name)
        for path in shards:
            if not path.is_file():
                raise CheckpointError(f"{path}: named by the index, and missing")
        return shards

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.values())

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        info = self[name]
        return self._bytes(info, info.offset, info.nbytes).view(info.dtype).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, shape (stop - start, ...)."""
        info = self[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"{name}: rows {start} to {stop} of {info.shape}")
        data = self._bytes(info, info.offset + start * info.row_bytes, (stop - start) * info.row_bytes)
        return data.view(info.dtype).reshape(stop - start, *info.shape[1:])

    @staticmethod
    def _bytes(info: TensorInfo, offset: int, count: int) -> torch.Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0
        with open(info.path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{info.path}: ended before its last tensor; fetch it again")
                done += got
        return data


class CheckpointWriter:
    """Writes tensors, whole or in rows and in any order, into shards planned beforehand.

    Args:
        folder: made if missing; files appear under their final names, so write into a
            folder that is renamed when everything is there.
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
        shards = self._distribute(plan, shard_bytes)
        names = [SINGLE_NAME]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        # A checkpoint of the other kind, left here by an earlier write, would be read instead of this one.
        (self.folder / (SINGLE_NAME if len(shards) > 1 else INDEX_NAME)).unlink(missing_ok=True)
        self._files = {}
        for file_name, tensors in zip(names, shards, strict=True):
            path = self.folder / file_name
            self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self._start(path, tensors, {"format": "pt", **(metadata or {})})
        if len(shards) > 1:
            total = sum(info.nbytes for info in self._places.values())
            weight_map = {name: info.path.name for name, info in sorted(self._places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def _distribute(plan, shard_bytes: int) -> list[dict[str, TensorInfo]]:
        shards: list[dict[str, TensorInfo]] = [{}]
        filled = 0
        for name, (dtype, shape) in plan.items():
            info = TensorInfo(dtype, tuple(shape))
            if shards[-1] and filled + info.nbytes > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = info
            filled += info.nbytes
        return shards

    def _start(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        # Wide types first, so that every tensor begins at a multiple of its item size.
        ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": metadata}
        position = 0
        for name, info in ordered:
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            position += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name, info in ordered:
            start = header[name]["data_offsets"][0]  # type: ignore[index]
            self._places[name] = TensorInfo(info.dtype, info.shape, path, 8 + len(text) + start)
            self._written[name] = []
        self._put(path, struct.pack("<Q", len(text)) + text, 0)

    def _put(self, path: Path, data: bytes | memoryview, offset: int) -> None:
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.pwrite(self._files[path], view[done:], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Put `tensor` in its place: all of it, or the rows from `first_row` on."""
        place = self._places[name]
        fits = tensor.ndim == len(place.shape) and tuple(tensor.shape[1:]) == place.shape[1:]
        if tensor.dtype != place.dtype or not fits:
            raise ValueError(f"{name}: planned as {place.dtype} {place.shape}, got {tensor.dtype} {tensor.shape}")
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        start = first_row * place.row_bytes
        if start < 0 or start + len(data) > place.nbytes:
            raise ValueError(f"{name}: rows from {first_row} on do not fit into {place.shape}")
        self._put(place.path, data, place.offset + start)
        self._written[name].append((start, start + len(data)))

    def _complete(self, name: str, nbytes: int) -> bool:
        """Whether every byte of a tensor came; rows written twice do not stand in for rows never written."""
        position = 0
        for start, stop in sorted(self._written[name]):
            if start > position:
                return False
            position = max(position, stop)
        return position == nbytes

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                unfinished = [name for name, place in self._places.items() if not self._complete(name, place.nbytes)]
                if unfinished:
                    raise ValueError(f"{self.folder}: {len(unfinished)} tensors unfinished, first {unfinished[0]}")
                for descriptor in self._files.values():
                    os.fsync(descriptor)
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
