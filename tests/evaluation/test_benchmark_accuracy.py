"""The accuracy benchmark: its options, its plot, and a reordered model with the same logits."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models.channel_shuffle import reorder_channels
from tests.support import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_accuracy")


def test_ways_are_divided_so_that_each_run_makes_a_variant_once(benchmark):
    asked = benchmark.ways("int8, int4:32:hqq,int4:32,int4:32,both")
    int4 = {"name": "int4", "group_size": 32}
    assert asked == [{"name": "int8"}, {**int4, "rounding": "hqq"}, int4, {"name": "int4"}]
    assert benchmark.rounds(asked) == [[asked[0], asked[1]], [asked[2]], [asked[3]]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("int4:x", "int4:x"), ("int4:32:hqq:more", "int4:32:hqq:more"), ("int4:-32", "int4:-32"), (",", "names none"),
        ("int9", "int9"), ("int8,int4:33", "33"), ("int8,int4:32,int4:32:awq", "awq"),
    ],
)  # fmt: skip
def test_invalid_variant_option_is_refused_before_any_work(tmp_path, tiny_model, given, told):
    command = [sys.executable, SCRIPTS / "benchmark_accuracy.py", tiny_model("llama"), "--variants", given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_frontier_keeps_undominated_variants(benchmark):
    points = [(10, 0.0), (5, 1.0), (4, 5.0), (6, 2.0), (4, 6.0), (5, 0.5)]
    assert benchmark.frontier(points) == [(4, 5.0), (5, 0.5), (10, 0.0)]


def test_reordered_model_gives_the_same_logits(benchmark, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    source, reordered, changed = tiny_model("llama"), tmp_path / "reordered", tmp_path / "changed"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    reorder_channels(model)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    model.save_pretrained(reordered)
    shutil.copytree(source, changed)
    tensors = load_file(changed / "model.safetensors")
    (name,) = [name for name in tensors if "layers.0.mlp.up_proj" in name]
    save_file({**tensors, name: tensors[name].flip(0)}, changed / "model.safetensors", {"format": "pt"})
    assert benchmark.logits_moved(source, reordered)["moved"] < 1e-5
    assert benchmark.logits_moved(source, changed)["moved"] > benchmark.MOVED


@pytest.mark.slow
def test_two_int4_roundings_are_measured_and_drawn(tiny_model, tmp_path):
    command = [sys.executable, SCRIPTS / "benchmark_accuracy.py", tiny_model("llama"), "--samples", "1"]
    command += ["--variants", "int8,int4:32:hqq,int4:32:rtn", "--set", "quantize.gate.rise=0.0001"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert [way["way"] for way in found["ways"]] == ["base", "int8 rtn", "int4 g32 hqq", "int4 g32 rtn"]
    assert [way["passed"] for way in found["ways"]][2:] == [False, False] and "FAIL" in done.stdout
    assert all(way["token_seconds"] and way["peak_memory_bytes"] for way in found["ways"])
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
