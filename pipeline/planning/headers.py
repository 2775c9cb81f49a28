"""What the first bytes of a model's files say: names, shapes and types of its tensors. Imports neither torch nor gguf.

`pipeline.models.checkpoint` reads the same headers to bring the tensors, and holds them to account; here nothing but
sizes is wanted, and quickly.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import CheckpointError

FIRST_BYTES = 100_000  # of a safetensors file, in which most headers end
LONGEST_HEADER = 100_000_000
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "BF16": 2, "F16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor by its shape, and the bytes of one of its values where it is stored."""

    shape: tuple[int, ...]
    item_bytes: int = 2

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def safetensors_header(name: str, read: Callable[[int, int], bytes]) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        read: gives bytes from the first position up to the second, or as many as there are.

    Raises:
        CheckpointError: where that is no header.
    """
    head = read(0, FIRST_BYTES)
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else -1
    if not 2 <= length <= LONGEST_HEADER:
        raise CheckpointError(f"{name}: not a safetensors file, or cut short")
    if 8 + length > len(head):
        head += read(len(head), 8 + length)
    try:
        header = json.loads(head[8 : 8 + length])
        header.pop("__metadata__", None)
        if not all(type(size) is int and size >= 0 for entry in header.values() for size in entry["shape"]):
            raise ValueError
        return {n: Tensor(tuple(e["shape"]), ITEM_BYTES[e["dtype"]]) for n, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{name}: its header does not say what tensors it has") from None


# GGUF's types of values: how they are read, and the two that hold others.
_PLAIN = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
# GGUF's names of a layer's weights, by which adapters and `keep` do not know them.
_MODULES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip


def gguf_header(name: str, file: BinaryIO) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The fields of a GGUF (of a list its length alone) and its tensors, named as a checkpoint would name them.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        CheckpointError: where that is no GGUF.
    """
    try:
        magic, version, tensors, fields = _unpack(file, "4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError
        found = {_text(file): _value(file, *_unpack(file, "I")) for _ in range(fields)}
        return found, dict(_gguf_tensors(file, tensors))
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError, RecursionError, OSError):
        raise CheckpointError(f"{name}: not a GGUF file, or cut short") from None


def _gguf_tensors(file: BinaryIO, count: int) -> Iterator[tuple[str, Tensor]]:
    for _ in range(count):
        name, (dimensions,) = _text(file), _unpack(file, "I")
        shape = _unpack(file, f"{dimensions}Q")[::-1]  # GGUF counts from the innermost
        _unpack(file, "IQ")
        yield _checkpoint_name(name), Tensor(tuple(shape))


def _checkpoint_name(name: str) -> str:
    name = name.replace("token_embd.", "model.embed_tokens.").replace("blk.", "model.layers.")
    name = "lm_head.weight" if name == "output.weight" else name
    return ".".join(_MODULES.get(part, part) for part in name.split("."))


def _unpack(file: BinaryIO, form: str) -> tuple:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _text(file: BinaryIO) -> str:
    return file.read(*_unpack(file, "Q")).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> object:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _unpack(file, _PLAIN[kind])[0]
    inner, count = _unpack(file, "IQ")
    if inner in _PLAIN:
        file.seek(count * struct.calcsize(f"<{_PLAIN[inner]}"), 1)
    else:
        for _ in range(count):
            _value(file, inner)
    return count
