"""Runs whose ledger an earlier release wrote, with files beside it that the ledger has today."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from pipeline.system.files import write_json
from pipeline.workflow.workspace import Workspace
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, Place

BESIDE = {"written": "", "measured": ".measured"}


def as_written_before(place: Place) -> None:
    """Give a run the ledger and the files that the release before this one wrote."""
    workspace = Workspace(place.run_folder)
    ledger = asdict(workspace.read_ledger())
    for key, entry in ledger["steps"].items():
        for kind, content in entry.pop("progress").items():
            if kind not in BESIDE:  # that release did not record which commit of the data it read
                continue
            write_json(workspace.quantized / f"{key.removeprefix('quantize/')}{BESIDE[kind]}.json", content)
        assert entry.pop("state") == "done"
    ledger["base"].pop("bytes")
    write_json(workspace.folder / "base.json", ledger["base"])
    write_json(workspace.folder / "inputs.json", ledger["inputs"])
    write_json(workspace.ledger_path, ledger["steps"])


@pytest.fixture
def former(copied) -> Place:
    as_written_before(copied)
    return copied


def test_finished_run_of_an_earlier_release_is_kept_without_its_data(former):
    steps, events = json.loads((former.run_folder / "ledger.json").read_text()), former.names()
    (former.folder / "rows.jsonl").unlink()  # its hash is known
    shown = json.loads(former.tunepress("status", "runs/tiny", "--json").stdout)["ledger"]
    assert shown.keys() == steps.keys()
    with LoopbackHub(former.folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as former.hub:
        former.tunepress("publish", "runs/tiny", "--repo", "ada/tiny")
        assert "int4/model.safetensors" in former.hub.files("ada/tiny")
    assert all(name.startswith(("publish", "model_card")) or "pushed" in name for name in former.names()[len(events) :])
    assert former.ledger().keys() == steps.keys() | {"publish"}
    assert not [
        name for name in ("base.json", "inputs.json", "quantized/int4.json") if (former.run_folder / name).exists()
    ]


def test_another_limit_neither_makes_nor_measures_a_variant_of_an_earlier_release_again(former):
    weights = former.release / "int4" / "model.safetensors"
    before, made = former.results()["int4"], weights.stat().st_mtime_ns
    former.tunepress("run", "tiny.yaml", "--set", "quantize.gate.kl=100")
    after = former.results()["int4"]
    assert after["gate"]["limits"]["kl"] == 100 != before["gate"]["limits"].get("kl")
    assert after["speed"] == before["speed"]  # times, which vary
    assert weights.stat().st_mtime_ns == made
