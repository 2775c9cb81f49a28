"""Names, shapes and types of tensors from the headers of a model's files, without torch or gguf.

`pipeline.models.checkpoint` reads the same headers with all its checks to bring the tensors themselves.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.models.gguf_metadata import read_header

FIRST_BYTES = 100_000  # of a safetensors file; most headers end in them
LONGEST_HEADER = 100_000_000
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "BF16": 2, "F16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """The shape of a tensor, and the stored bytes of one of its values."""

    shape: tuple[int, ...]
    item_bytes: int = 2

    @property
    def numel(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)


def safetensors_header(name: str, read: Callable[[int, int], bytes]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        name: the file, for errors.
        read: returns the bytes from the first position up to the second, or up to the end of the file.

    Raises:
        CheckpointError: if the header is invalid.
    """
    head = read(0, FIRST_BYTES)
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else -1
    if not 2 <= length <= LONGEST_HEADER:
        raise CheckpointError(f"{name}: not a safetensors file, or truncated")
    if 8 + length > len(head):
        head += read(len(head), 8 + length)
    try:
        header = json.loads(head[8 : 8 + length])
        header.pop("__metadata__", None)
        if not all(type(size) is int and size >= 0 for entry in header.values() for size in entry["shape"]):
            raise ValueError
        return {n: Tensor(tuple(e["shape"]), ITEM_BYTES[e["dtype"]]) for n, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{name}: its safetensors header is invalid") from None


# GGUF's names of a layer's weights, and the names in a checkpoint, which adapters and `keep` use.
_MODULES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip


def gguf_header(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the metadata of a GGUF, and its tensors by their names in a checkpoint.

    Raises:
        CheckpointError: if the file is not a whole GGUF.
    """
    header = read_header(path)
    return header.keys, {_checkpoint_name(name): Tensor(tensor.shape) for name, tensor in header.tensors.items()}


def _checkpoint_name(name: str) -> str:
    name = name.replace("token_embd.", "model.embed_tokens.").replace("blk.", "model.layers.")
    name = "lm_head.weight" if name == "output.weight" else name
    return ".".join(_MODULES.get(part, part) for part in name.split("."))
