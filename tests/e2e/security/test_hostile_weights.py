"""Weights, indexes, GGUF files and adapters from anywhere: each is read, or refused in one line."""

from __future__ import annotations

import json
import struct

import pytest

from tests.support.audit_watch import TOKEN
from tests.support.hostile import DEEP, ESCAPES, PICKLE


def header(content: object, tail: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tail


def tensor(shape, start=0, end=4, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHTS = {
    "pickle": PICKLE,
    "empty": b"",
    "short": b"\x00\x00",
    "length of everything": header({}, length=2**64 - 1),
    "length beyond the file": header({}, length=10_000),
    "deep": header(DEEP),
    "a list": header([1]),
    "no JSON": header(b"\xff\xff"),
    "twice": header(b'{"w": 1, "w": 2}'),
    "negative shape": header({"w": tensor([-1])}, b"1234"),
    "huge shape": header({"w": tensor([2**62, 2**62])}, b"1234"),
    "number of thousands of digits": header(b'{"w": {"dtype": "F32", "shape": [' + b"9" * 6000 + b']}}'),
    "float shape": header({"w": tensor([1.0])}, b"1234"),
    "text shape": header({"w": tensor("12")}, b"1234"),
    "no shape": header({"w": {"dtype": "F32"}}),
    "offsets beyond": header({"w": tensor([1], 10, 14)}, b"1234"),
    "offsets backwards": header({"w": tensor([1], 4, 0)}, b"1234"),
    "overlap": header({"v": tensor([1]), "w": tensor([1])}, b"1234"),
    "unknown type": header({"w": tensor([1], dtype="../F32")}, b"1234"),
    "type of no kind": header({"w": tensor([1], dtype=[])}, b"1234"),
    "metadata of no kind": header({"__metadata__": {"a": 1}}),
    "escapes": header({ESCAPES: tensor([2])}, b"1234"),
    "a token": header({TOKEN: tensor([2])}, b"1234"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_header_of_weights_is_refused(survives, place, name):
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.planning.headers import safetensors_header

    (place / "model.safetensors").write_bytes(WEIGHTS[name])
    told = survives(lambda: Checkpoint(place))
    assert told and "model.safetensors" in told and not (place / "owned").exists()
    survives(lambda: safetensors_header("x", lambda start, stop: WEIGHTS[name][start:stop]))


INDEXES = [
    "../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "pytorch_model.bin", "..", "", "x.safetensors\x00",
    "~/x.safetensors", 7, None, ["x"], "model-00001-of-99999.safetensors", "nowhere.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", INDEXES, ids=repr)
def test_index_that_points_elsewhere_is_refused(survives, place, file):
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.checkpoint_files import weight_names

    content = json.dumps({"weight_map": {"w": file}})
    (place / "model.safetensors.index.json").write_text(content)
    assert survives(lambda: Checkpoint(place))
    names = {"model.safetensors.index.json", "pytorch_model.bin", "a/b.safetensors", "x.bin"}
    assert survives(lambda: weight_names("user/model", names, lambda name: content.encode()))


def gguf(*parts: bytes, fields: int = 1, tensors: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields) + b"".join(parts)


def field(kind: int, value: bytes, key: bytes = b"general.name") -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


ARRAY_OF_ARRAYS = struct.pack("<IQ", 9, 1) * 50_000


FILES_OF_LLAMA_CPP = {
    "pickle": PICKLE,
    "empty": b"",
    "version": b"GGUF" + b"\xff" * 40,
    "more fields than bytes": gguf(fields=2**64 - 1),
    "more tensors than bytes": gguf(fields=0, tensors=2**64 - 1),
    "endless key": gguf(struct.pack("<Q", 2**63)),
    "endless text": gguf(field(8, struct.pack("<Q", 2**62))),
    "endless array": gguf(field(9, struct.pack("<IQ", 4, 2**62))),
    "arrays in arrays": gguf(field(9, ARRAY_OF_ARRAYS)),
    "no such kind": gguf(field(99, b"")),
    "no such kind in an array": gguf(field(9, struct.pack("<IQ", 99, 5))),
    "no text": gguf(field(8, struct.pack("<Q", 3) + b"\xff\xfe\xfd")),
    "dimensions": gguf(struct.pack("<Q", 1) + b"w" + struct.pack("<I", 2**31), fields=0, tensors=1),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES_OF_LLAMA_CPP)
def test_gguf_file_is_refused(survives, place, name):
    from pipeline.models.gguf_metadata import read_dialogue, read_header

    path = place / "x.gguf"
    path.write_bytes(FILES_OF_LLAMA_CPP[name])
    told = survives(lambda: read_header(path))
    survives(lambda: read_dialogue(path))
    assert (told or name == "no text") and not (place / "owned").exists()


ADAPTERS = {
    "pickle": PICKLE,
    "deep": DEEP,
    "a list": b"[]",
    "another kind": b'{"peft_type": {"a": 1}}',
    "names of no kind": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": 7}',
    "a name of no kind": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": [7]}',
    "rank of no kind": b'{"peft_type": "LORA", "r": "2", "lora_alpha": 4}',
    "huge scale": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1' + b"0" * 400 + b"}",
    "endless scale": b'{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}',
    "no pattern": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"(": 2}}',
    "a module to import": b'{"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "megatron.x"}',
    "a start of its own": b'{"peft_type": "LORA", "init_lora_weights": ["loftq"]}',
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_refused(survives, place, name):
    import torch
    from safetensors.torch import save_file

    from pipeline.models.lora_adapter import Adapter

    factors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.q.{part}.weight": t for part, t in factors.items()}, place / "adapter_model.safetensors"
    )
    (place / "adapter_config.json").write_bytes(ADAPTERS[name])
    assert survives(lambda: Adapter.read(place)) and not (place / "owned").exists()


def test_pickled_adapter_is_refused(survives, place):
    from pipeline.models.sources import check_adapter

    (place / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (place / "adapter_model.bin").write_bytes(PICKLE)
    assert "has no adapter_model.safetensors" in survives(lambda: check_adapter(str(place)))
