"""The header of a safetensors file, checked before anything in it is used."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
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
    """The description of a tensor in a header: `dtype`, `shape`, and the place of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path = Path()
    offset: int = 0  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row, which is one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return tensors and metadata of a safetensors file, checked against the size of the file.

    Raises:
        CheckpointError: if the header is not one, or offsets overlap, leave gaps, or
            disagree with a shape or with the file.
    """
    return check_header(path, *_first_bytes(path))


def check_header(path: Path, head: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the same from the first bytes of a file up to its tensors, and its whole size in bytes."""
    header, start = _parse(path, head, size), 8 + header_length(path, head, size)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the metadata is not a table of strings")
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise CheckpointError(f"{path}: {name!r} overlaps its neighbour or leaves a gap")
        position += info.nbytes
    if position != size:
        raise CheckpointError(f"{path}: {size} bytes where its header says {position}; fetch it again")
    return tensors, metadata


def header_length(path: Path, head: bytes, size: int) -> int:
    """Return the length of the header's JSON in bytes, which the first eight bytes state."""
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path}: not a safetensors file, or cut short")
    return length


def _first_bytes(path: Path) -> tuple[bytes, int]:
    """Return the bytes of a file up to its tensors, and the size of the file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            return prefix + file.read(header_length(path, prefix, size)), size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(path: Path, head: bytes, size: int) -> dict:
    """Return the header's JSON."""
    try:
        header = json.loads(head[8 : 8 + header_length(path, head, size)], object_pairs_hook=once_each)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} stands twice in the header") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a table of tensors")
    return header


def _entry(path: Path, name: str, entry: Any, first: int) -> TensorInfo:
    try:
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        start, end = entry["data_offsets"]
        sound = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the entry of {name!r} is malformed or of an unknown type") from None
    # Nothing times anything is nothing, so a shape with a 0 in it may say what it likes of the rest.
    if not sound or len(shape) > MAX_DIMENSIONS or math.prod(n for n in shape if n) >= 2**63:
        raise CheckpointError(f"{path}: {name!r} has a shape and a length that disagree")
    info = TensorInfo(dtype, tuple(shape), path, first + start)
    if end - start != info.nbytes:
        raise CheckpointError(f"{path}: {name!r} has a shape and a length that disagree")
    return info


def once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object for `json.loads`; raise KeyError with the first name that stands twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return table
