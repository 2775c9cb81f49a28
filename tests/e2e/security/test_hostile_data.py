"""Data files and names from anywhere: each is read, or refused in one line; nothing else happens."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest

from pipeline.config.schema import Data, Model
from tests.support.audit_watch import HUB_TOKEN, TOKEN, WRITE_TOKEN, watching
from tests.support.hostile import DEEP, ESCAPES, PICKLE

# Data files: what stands in them, by name.
DATA = {
    "deep.jsonl": DEEP,
    "escapes.jsonl": json.dumps({"prompt": ESCAPES, "completion": 7}).encode(),
    "escaped-column.jsonl": json.dumps({ESCAPES: "a", "reply": "b"}).encode(),
    "token.jsonl": json.dumps({"prompt": "a", "completion": [TOKEN, HUB_TOKEN]}).encode(),
    "token-as-column.jsonl": json.dumps({TOKEN: "a", WRITE_TOKEN: "b"}).encode(),
    "token-cut.jsonl": json.dumps({"prompt": "a", "completion": ["x" * 40, WRITE_TOKEN]}).encode(),
    "half-character.jsonl": b'{"prompt": "\\ud800", "completion": "b"}',
    "huge-number.jsonl": b'{"prompt": ' + b"9" * 6000 + b', "completion": "b"}',
    "infinite.jsonl": b'{"prompt": Infinity, "completion": NaN}',
    "twice.jsonl": b'{"prompt": "a", "prompt": 1, "completion": "b"}',
    "nul.jsonl": b"\x00" * 1000,
    "one-line.jsonl": b'{"prompt": "' + b"a" * 1_000_000,
    "role.jsonl": json.dumps({"messages": [{"role": ESCAPES, "content": "a"}]}).encode(),
    "nested.jsonl": json.dumps({"messages": [{"role": "user", "content": {"a": [1]}}]}).encode(),
    "array.json": b'{"prompt": "a"}]',
    "deep.json": DEEP,
    "pickle.json": PICKLE,
    "pickle.jsonl": PICKLE,
    "pickle.parquet": PICKLE,
    "pickle.csv": PICKLE,
    "pickle.pkl": PICKLE,
    "cut.parquet": b"PAR1" + b"\xff" * 64 + b"PAR1",
    "length.parquet": b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "formula.csv": b'prompt,completion\n"=cmd|\'/C calc\'!A0",\n',
    "quotes.csv": b'prompt,completion\n"a' + b"b" * 200_000,
    "nul.csv": b"prompt,completion\na\x00b,\n",
    "columns.csv": b"," * 50_000 + b"\n",
    "escapes.tsv": f"prompt\tcompletion\n{ESCAPES}\t\n".encode(),
    "bytes.tsv": b"\xff\xfe\x00prompt",
    "packed.jsonl.gz": b"\x1f\x8b",
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_file_is_refused(survives, place, name):
    from pipeline.data import load_examples

    (place / name).write_bytes(DATA[name])
    assert survives(lambda: load_examples(Data(source=name))) and not (place / "owned").exists()


NAMES = [
    "../up", "/etc", "/etc/passwd", "~root/x", "~nobody-here/x", "a" * 5000, "./" + "a/" * 3000, "user/..",
    "user/a/../../b", "C:\\x", "user/mo%2fdel", "user\\model", "-rf/x", "user/\u0430bc", "package:os/x.gguf",
    "package:pipeline.cli/x.gguf", "package:../x/y.gguf", "file:///etc/passwd", "https://ada@hub.org/x", "$(id)/x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", ["model", "data", "adapter", "repository", "run", "loaded", "status", "accelerate"])
def test_name_is_refused_or_taken_literally(survives, place, name, of):
    from pipeline.config.loader import parse_config
    from pipeline.data.sources import locate
    from pipeline.inference.load import locate as find_model
    from pipeline.models.sources import check_adapter, check_source
    from pipeline.training.accelerate_launch import read_launch
    from pipeline.workflow.workspace import Workspace

    tree = {"name": "tiny", "model": {"source": "user/model"}, "data": {"source": "x.jsonl"}}
    checks = {
        "model": lambda: check_source(Model(source=name)) if name.startswith(("package:", ".", "/", "~")) else None,
        "data": lambda: locate(name),
        "adapter": lambda: check_adapter(name),
        "repository": lambda: parse_config({**tree, "publish": {"repo": name}}, "x.yaml"),
        "run": lambda: parse_config({**tree, "name": name}, "x.yaml"),
        "loaded": lambda: find_model(name),
        "status": lambda: Workspace.open(name),
        "accelerate": lambda: read_launch(name),
    }
    if of == "model" and name.startswith("package:") and not name.endswith("os/x.gguf"):
        pytest.skip("is no source that a configuration takes")
    told = survives(checks[of])
    assert told or of in ("model", "data")


FILES = [
    "../x.safetensors", "/etc/x.json", "a/../../x.json", "..json", "x.bin", "x.py", "x.pt", "x.pkl",
    "model.safetensors/x", "a/x.safetensors", "x.json\n", ".env", "adapter_config.json", "adapter_model.safetensors",
    "training_args.bin",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_dangerous_file_is_not_fetched(name):
    from pipeline.models.checkpoint_files import belongs_to_checkpoint

    assert not belongs_to_checkpoint(name) or name == "..json"


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "gguf/../../x-Q8_0.gguf", "a//x", "./x", "a\\x", "a\nb", ""])
def test_name_outside_the_folder_is_not_fetched(survives, name):
    from pipeline.hub.download import check_names

    assert "unsafe file name" in survives(lambda: check_names("user/model", ["config.json", name]))
    check_names("user/model", ["config.json", "int8/model.safetensors", ".gitattributes", "..json"])


def test_audit_watch_detects_violations(place):
    with watching(place) as watch:
        (place / "inside").write_text("x")
        (place.parent / "outside").write_text("x")
        (place / "inside").rename(place.parent / "elsewhere")
        pickle.loads(pickle.dumps(os.path.join))
        os.system("true")
    told = " ".join(watch.seen)
    assert len(watch.seen) == 4 and all(w in told for w in ("outside", "elsewhere", "pickle.find_class", "os.system"))
