"""Whole runs with other trackers: every record arrives once, and no key is written anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.mlflow_server import MlflowStore
from tests.support.runs import Place, write_place
from tests.support.wandb_server import KEY, WandbServer

pytestmark = pytest.mark.slow


def _run(folder: Path, model: Path, track: dict) -> tuple[Place, list[dict]]:
    """Run everything, and return the place and the records of the spool."""
    steps = {"max_steps": 2, "batch_size": 2, "accumulate": 1, "max_length": 96, "method": "lora"}
    variants = {"variants": ["int8"], "on_gate_failure": "warn"}
    place = write_place(folder, model, train=steps, quantize=variants, track=track)
    place.more_env["WANDB_API_KEY"] = KEY
    done = place.tunepress("run", "tiny.yaml")
    assert "missed records" not in done.stdout
    assert "0 records sent" in place.tunepress("sync", "runs/tiny").stdout
    lines = (place.run_folder / "events.jsonl").read_text().splitlines()
    return place, [json.loads(line) for line in lines]


def test_wandb_has_every_record_of_a_run_once(tmp_path, tiny_model):
    server = WandbServer().start()
    try:
        place, records = _run(tmp_path, tiny_model("llama"), server.track)
    finally:
        server.stop()
    server.assert_once_each(records)
    assert server.run.state == "finished" and any(name.endswith(".png") for name in server.run.files)
    assert not any(KEY.encode() in path.read_bytes() for path in place.folder.rglob("*") if path.is_file())


def test_mlflow_has_every_record_of_a_run_once(tmp_path, tiny_model, empty_mlflow):
    store = MlflowStore(tmp_path / "board", empty_mlflow)
    _, records = _run(tmp_path / "work", tiny_model("llama"), store.track)
    store.assert_once_each(records)
    assert store.rows("select status from runs") == [("FINISHED",)]
    assert list(store.folder.rglob("perplexity_against_size.png"))
