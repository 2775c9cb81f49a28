"""Reproducible files: the same inputs give the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.writer import quantize_checkpoint
from pipeline.system.files import sha256
from pipeline.system.process_environment import with_own_package

NAMES = ("int8", "int8-dynamic", "int4", "gguf-q4_0")


def make(source: Path, folder: Path) -> None:
    specs = [VariantSpec(name=name).resolved() for name in NAMES]
    folders = {name: folder / name for name in NAMES}
    quantize_checkpoint(source, specs, folders, linear_weights(source), tables=table_weights(source), name="demo")


def hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_other_process_hash_seed_and_threads_write_the_same_bytes(tiny_model, tmp_path):
    source = tiny_model("llama")
    make(source, tmp_path / "here")
    imports = "import sys; from pathlib import Path; from tests.quantization.test_reproducible_bytes import make"
    code = f"{imports}; make(*map(Path, sys.argv[1:]))"
    environment = with_own_package(os.environ) | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    ours = hashes(tmp_path / "here")
    assert {f"{name}/config.json" for name in NAMES[:3]} <= ours.keys() and "gguf-q4_0/demo-Q4_0.gguf" in ours
    assert hashes(tmp_path / "there") == ours
