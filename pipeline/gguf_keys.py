"""What a GGUF says of itself before its tensors: tokenizer, chat template, sampling. Needs no library.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import CheckpointError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_ENDS = ("eos", "eot", "eom")  # kinds of tokens that end an answer
_SAMPLING = "general.sampling."


@dataclass(frozen=True)
class Dialogue:
    """How a GGUF is talked to.

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
    """How the GGUF at `path` is talked to; that of a file that did not change is read once.

    Raises:
        CheckpointError: where it is no GGUF, or only the beginning of one.
    """
    state = path.stat()
    return _read_dialogue(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_dialogue(path: Path, size: int, mtime_ns: int) -> Dialogue:
    keys = _read_keys(path)
    words = keys.get("tokenizer.ggml.tokens", [])
    ids = {kind: keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in (*_ENDS, "bos", "unk")}
    ids["pad"] = keys.get("tokenizer.ggml.padding_token_id")
    texts = {kind: words[token] for kind, token in ids.items() if token is not None and token < len(words)}
    return Dialogue(
        template=keys.get("tokenizer.chat_template"),
        tokens={f"{kind}_token": texts[kind] for kind in ("bos", "eos", "unk", "pad") if kind in texts},
        stops=tuple(dict.fromkeys(texts[kind] for kind in _ENDS if kind in texts)),
        adds_first=bool(keys.get("tokenizer.ggml.add_bos_token")),
        sampling={key.removeprefix(_SAMPLING): value for key, value in keys.items() if key.startswith(_SAMPLING)},
    )


def _read_keys(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file")
            _, _, count = struct.unpack("<IQQ", _exactly(file, 20))
            return {_text(file): _value(file, *struct.unpack("<I", _exactly(file, 4))) for _ in range(count)}
    except (EOFError, KeyError, UnicodeDecodeError, struct.error):
        raise CheckpointError(f"{path}: only the beginning of a GGUF file, or damaged") from None


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _numbers(file, kind, 1)[0]
    inner, count = struct.unpack("<IQ", _exactly(file, 12))
    if inner in (_TEXT, _ARRAY):
        return [_value(file, inner) for _ in range(count)]
    return _numbers(file, inner, count)


def _numbers(file: BinaryIO, kind: int, count: int) -> tuple:
    form = f"<{count}{_NUMBERS[kind]}"
    return struct.unpack(form, _exactly(file, struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _exactly(file, 8))
    return _exactly(file, length).decode()


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError
    return data
