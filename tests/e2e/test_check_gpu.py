"""`scripts/check_gpu.py` on a CPU: its table, its results as JSON, and what a broken library leaves standing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.catalog import VARIANTS, register, remove
from pipeline.config.training_catalog import DEFAULT_TRAINER, METHODS, TRAINERS
from tests.support import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


def check(folder: Path, *arguments: str, code: int = 0, env: dict[str, str] | None = None) -> tuple[dict, str]:
    """Run the script on a tiny model; the results by check, and what it printed."""
    output = folder / "checks.json"
    words = [sys.executable, str(SCRIPTS / "check_gpu.py"), "--device", "cpu", "--quick", "--json", str(output)]
    done = subprocess.run([*words, *arguments], env=os.environ | (env or {}), capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return {row["name"]: row for row in json.loads(output.read_text())["checks"]}, done.stdout


@pytest.fixture
def script(monkeypatch):
    """`script(name)`: a module of `scripts/`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_check_that_crashes_is_wrong_and_the_others_go_on(tmp_path):
    """A library that ends the process that imports it."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("import os\nos.abort()\n")
    asked = ("--only", "machine,int8,int4:*,bnb-nf4,w8a16")
    found, printed = check(tmp_path, *asked, code=1, env={"PYTHONPATH": str(tmp_path)})
    assert list(found) == ["machine", "model", "int8", "int4:tile_packed", "bnb-nf4", "w8a16"]
    assert [line.split()[0] for line in printed.splitlines()[:-1]] == list(found)
    broken = found.pop("bnb-nf4")
    assert broken["state"] == "wrong" and "SIGABRT" in broken["reason"]
    assert {row["state"] for row in found.values()} == {"ok"}
    assert all(row["seconds"] > 0 and row["figures"] for row in found.values())
    assert found["int8"]["figures"]["stock"].startswith("off ")
    assert found["int4:tile_packed"]["figures"]["pipeline.load"].startswith("off ")


def test_checks_without_time_or_without_what_they_need_are_left_out(tmp_path):
    found, _ = check(tmp_path, "--minutes", "0.1")
    assert {row["state"] for row in found.values()} == {"not possible here"}
    assert found["machine"]["reason"] == "no time left (--minutes)"
    assert found["resume"]["reason"] == f"needs train-{next(iter(METHODS))}, which is not possible here"


def test_unknown_check_is_refused_with_the_names_that_exist(tmp_path):
    words = [sys.executable, str(SCRIPTS / "check_gpu.py"), "--device", "cpu", "--only", "int9"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "--only int9: no such check" in done.stderr and "int4:tile_packed" in done.stderr


def test_methods_trainers_variants_and_packings_are_those_of_the_registries(script):
    register(replace(VARIANTS["int8"], name="int8-again"))
    try:
        found = script("gpu_checks").checks()
    finally:
        remove("int8-again")
    assert "int8-again" in found
    assert {f"{step}-{method}" for step in ("train", "merge") for method in METHODS} <= set(found)
    assert {f"train-{name}" for name in TRAINERS if name != DEFAULT_TRAINER} <= set(found)
    assert {f"{v.name}:{packing}" for v in VARIANTS.values() for packing in list(v.packings)[1:]} <= set(found)


def test_other_logits_and_those_that_are_not_numbers_are_wrong(script):
    place = script("gpu_place")
    logits = torch.randn(4, 9)
    assert place.check_logits("stock", logits * 1.01, logits) == "1.00%"
    for other in (logits * 1.1, logits / 0):
        with pytest.raises(place.Wrong, match="stock: logits are off"):
            place.check_logits("stock", other, logits)


def test_wheels_of_the_installed_versions_are_named(script):
    words = script("check_gpu")._wheels_command("wheels").split()
    assert words[:2] == ["pip", "download"] and words[words.index("-d") + 1] == "wheels"
    assert sum(word.startswith("trl==") for word in words) == 1


@pytest.mark.slow
def test_everything_that_a_cpu_can_is_ok(tmp_path):
    found, _ = check(tmp_path, "--minutes", "40")
    wrong = [row for row in found.values() if row["state"] == "wrong"]
    assert not wrong
    assert found["resume"]["figures"]["weights"] == "the same to the byte"
