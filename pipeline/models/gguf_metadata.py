"""The metadata of a GGUF file: tokenizer, chat template, sampling and the places of its tensors.

This needs no library. A file may come from anywhere, so no length or number in it is trusted.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import CheckpointError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_TYPES = {  # by ggml's number: its name, the columns of a block, and the block's bytes
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
BLOCKS = {name: (columns, count) for name, columns, count in _TYPES.values()}  # columns, bytes
_VERSIONS = (2, 3)
ALIGNMENT = 32  # of tensors, where the file says nothing else
LONGEST_NAME, LONGEST_TEXT = 1 << 16, 1 << 24  # bytes; more is no name, and no text that anybody reads
MOST_ENTRIES, MOST_DIMENSIONS = 1 << 24, 4
ENDS = ("eos", "eot", "eom")  # kinds of tokens that end an answer
SAMPLING = "general.sampling."


@dataclass(frozen=True)
class Dialogue:
    """The chat settings of a GGUF file.

    Attributes:
        template: its chat template in Jinja, if it has one.
        tokens: texts of special tokens by the names that chat templates give them, such as `bos_token`.
        stops: texts of the tokens that end an answer.
        adds_first: is `bos_token` put before every text?
        sampling: what the model's makers recommend, such as {"temp": 0.6}.
    """

    template: str | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    adds_first: bool = False
    sampling: dict[str, float] = field(default_factory=dict)


def read_dialogue(path: Path) -> Dialogue:
    """Return the chat settings of the GGUF file at `path`; a file that did not change is read once.

    Raises:
        CheckpointError: if it is no GGUF, or only the beginning of one.
    """
    state = path.stat()
    return _read_dialogue(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_dialogue(path: Path, size: int, mtime_ns: int) -> Dialogue:
    keys = _read_keys(path)
    words = keys.get("tokenizer.ggml.tokens", [])
    ids = {kind: keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in (*ENDS, "bos", "unk")}
    ids["pad"] = keys.get("tokenizer.ggml.padding_token_id")
    texts = {kind: words[token] for kind, token in ids.items() if token is not None and token < len(words)}
    return Dialogue(
        template=keys.get("tokenizer.chat_template"),
        tokens={f"{kind}_token": texts[kind] for kind in ("bos", "eos", "unk", "pad") if kind in texts},
        stops=tuple(dict.fromkeys(texts[kind] for kind in ENDS if kind in texts)),
        adds_first=bool(keys.get("tokenizer.ggml.add_bos_token")),
        sampling={key.removeprefix(SAMPLING): value for key, value in keys.items() if key.startswith(SAMPLING)},
    )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a GGUF file: its type, such as `Q4_0`, its shape with rows first, and its place in bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The part of a GGUF file before the numbers of its tensors.

    Attributes:
        keys: single values by name, and those arrays that were asked for.
        tensors: by name, in the file's order.
    """

    keys: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path, arrays: Collection[str] = ()) -> Header:
    """Return the keys of a complete GGUF file and the places of its tensors, without reading their numbers.

    Args:
        arrays: names of arrays to read; others, such as a vocabulary, are passed over.

    Raises:
        CheckpointError: if it is no GGUF, is damaged, or ends before its last tensor.
    """
    try:
        with _opened(path) as file:
            tensor_count, keys = _keys(file, arrays)
            found = [_tensor(file) for _ in range(tensor_count)]
            alignment = keys.get("general.alignment", ALIGNMENT)
            if not isinstance(alignment, int) or alignment < 1:
                raise _Damaged(f"its alignment is {alignment}")
            if odd := [name for name, tensor in found if tensor.offset % alignment]:
                raise _Damaged(f"{odd[0]} begins between multiples of {alignment}")
            start = file.position + -file.position % alignment
            tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found}
            if any(tensor.offset + tensor.nbytes > file.size for tensor in tensors.values()):
                raise _Damaged("it ends before its last tensor")
            if len(tensors) < tensor_count:
                raise _Damaged("it has two tensors of the same name")
            return Header(keys, tensors)
    except (_Damaged, UnicodeDecodeError) as error:
        reason = error if isinstance(error, _Damaged) else "a text is none"
        raise CheckpointError(f"{path}: not a whole GGUF file ({reason}); make it again") from None


def _read_keys(path: Path) -> dict[str, Any]:
    try:
        with _opened(path) as file:
            return _keys(file, ("tokenizer.ggml.tokens",))[1]
    except (_Damaged, UnicodeDecodeError):
        raise CheckpointError(f"{path}: only the beginning of a GGUF file, or damaged") from None


class _Damaged(Exception):
    """A statement of the file that does not hold."""


class _File:
    """A file that is never read beyond its end, whatever lengths it states."""

    def __init__(self, file: BinaryIO):
        self._file, self.size, self.position = file, os.fstat(file.fileno()).st_size, file.tell()

    def read(self, form: str) -> tuple:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))

    def bytes(self, count: int) -> bytes:
        self._advance(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, os.SEEK_CUR)

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self.size:
            raise _Damaged("it ends too soon")

    def text(self, longest: int) -> str:
        (length,) = self.read("Q")
        if length > longest:
            raise _Damaged(f"a text of {length} bytes")
        return self.bytes(length).decode()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_File]:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file")
            yield _File(file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _keys(file: _File, arrays: Collection[str]) -> tuple[int, dict[str, Any]]:
    """Return the number of tensors, and the keys."""
    version, tensor_count, count = file.read("IQQ")
    if version not in _VERSIONS:
        raise _Damaged(f"version {version} is not read here")
    found = {}
    for _ in range(count):
        name, (kind,) = file.text(LONGEST_NAME), file.read("I")
        if kind != _ARRAY:
            found[name] = file.text(LONGEST_TEXT) if kind == _TEXT else file.read(_number(kind))[0]
        elif name in arrays:
            found[name] = _array(file)
        else:
            _skip_array(file)
    return tensor_count, found


def _array(file: _File) -> list | tuple:
    kind, count = file.read("IQ")
    if count > MOST_ENTRIES:
        raise _Damaged(f"an array of {count} entries")
    if kind == _TEXT:
        return [file.text(LONGEST_TEXT) for _ in range(count)]
    return file.read(f"{count}{_number(kind)}")


def _skip_array(file: _File) -> None:
    kind, count = file.read("IQ")
    if kind != _TEXT:
        file.skip(count * struct.calcsize(f"<{_number(kind)}"))
        return
    for _ in range(count):
        file.skip(*file.read("Q"))


def _number(kind: int) -> str:
    if kind not in _NUMBERS:  # arrays of arrays too, which nobody writes
        raise _Damaged(f"a value of the unknown type {kind}")
    return _NUMBERS[kind]


def _tensor(file: _File) -> tuple[str, StoredTensor]:
    """Return a tensor's name and description; its place counts from the start of all tensors."""
    name, (dimensions,) = file.text(LONGEST_NAME), file.read("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise _Damaged(f"{name} has {dimensions} dimensions")
    width, *others = file.read(f"{dimensions}Q")
    code, offset = file.read("IQ")
    if code not in _TYPES:
        raise _Damaged(f"{name} is of the type {code}, which is not read here")
    kind, columns, block_bytes = _TYPES[code]
    if width % columns:
        raise _Damaged(f"{name} is {kind} with {width} columns")
    shape = (*reversed(others), width)
    return name, StoredTensor(kind, shape, offset, math.prod(others) * (width // columns) * block_bytes)
