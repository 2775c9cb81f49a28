"""Releases without training: a merged foreign adapter, or variants alone."""

from __future__ import annotations

import json

import pytest

from pipeline.workflow.stages import publish
from pipeline.workflow.workspace import HIDDEN, Workspace
from tests.support import sample
from tests.support.fake_runs import BOTH, REPO, FakeRun, weights


@pytest.fixture
def midway(tmp_path) -> FakeRun:
    """Variants of a model as it is, in a folder that was asked for by name."""
    found = sample.results()
    workspace = Workspace(tmp_path / "out" / HIDDEN)
    config = sample.config(data=None, publish={"repo": REPO})
    run = FakeRun(workspace, config)
    origin = found.get("origin") or found["training"]["base"]
    for name, figures in {"origin": origin, "base": found["base"]}.items():
        workspace.write_measurement(name, figures)
    for name in BOTH:
        run.make_variant(name)
    return run


def test_variants_alone_are_published_without_a_model_at_the_root(hub, midway):
    midway.publish()
    files = set(hub.files(REPO))
    assert {"int8/model.safetensors", "int4/model.safetensors", "README.md", "tunepress.json"} <= files
    assert "config.json" not in files and not [name for name in files if name.startswith((".tunepress", ".."))]
    lineage = json.loads(hub.read(REPO, "tunepress.json"))
    assert "data" not in lineage and "merged_into" not in lineage and lineage["base"]
    assert set(lineage["files"]) == {
        f"{v}/{n}" for v in BOTH for n in ("config.json", "tokenizer.json", "model.safetensors")
    }
    assert (midway.release / "README.md").read_bytes() == hub.read(REPO, "README.md")
    pushed = ("adapter_pushed", "merged_model_pushed", "quantized_model_pushed", "model_card_pushed")
    assert [len(midway.events(event)) for event in pushed] == [0, 0, 2, 1]


def test_repository_of_an_entirely_withheld_release_is_reported(hub, midway):
    assert publish.still_there(midway.config, BOTH) == []
    midway.publish(("int4",))
    (line,) = publish.still_there(midway.config, BOTH)
    assert line.startswith(f"{REPO}: still has int4 of an earlier release, withheld now; ")
    assert line.endswith(f"tunepress rollback {REPO}")
    midway.configure(name="another")
    assert publish.still_there(midway.config, BOTH) == []


def test_user_files_and_folders_of_variants_stay(hub, midway):
    other = midway.release / "int8-dynamic" / "model.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"mine")
    midway.publish()
    (midway.release / "int4" / "notes.md").write_bytes(b"mine")
    midway.publish(("int8",))
    assert [path.name for path in (midway.release / "int4").iterdir()] == ["notes.md"]
    assert other.read_bytes() == b"mine" and "int8-dynamic/model.safetensors" not in hub.files(REPO)


def test_foreign_adapter_is_published_with_its_origin(hub, midway, tmp_path):
    adapter = tmp_path / "my-adapter"
    adapter.mkdir()
    midway.configure(merge={"adapter": str(adapter)})
    found = sample.results()
    midway.workspace.write_measurement("merged", found["merged"])
    midway.workspace.write_measurement("merge", {"base": "bf16", "asked": "auto", "compared": {}})
    midway.workspace.write_measurement(
        "adapter", {"source": str(adapter), "name": "my-adapter", "revision": None, "hub_id": None}
    )
    midway.make("merge", {"config.json": b"{}", "model.safetensors": weights()})
    midway.publish()
    assert "model.safetensors" in hub.files(REPO)
    lineage = json.loads(hub.read(REPO, "tunepress.json"))
    assert lineage["adapter"]["source"] == "my-adapter" and str(tmp_path) not in json.dumps(lineage)
    assert len(midway.events("merged_model_pushed")) == 1 and midway.events("adapter_pushed") == []


def test_the_lineage_names_the_data_by_what_was_asked_and_what_was_found(hub, finished):
    finished.configure(data={"source": "ada/rows", "subset": "en", "revision": "main"})
    data = finished.workspace.read_measurement("data")
    finished.workspace.write_measurement("data", data | {"source": "ada/rows", "subset": "en", "revision": "c0ffee"})
    finished.publish()
    found = json.loads(hub.read(REPO, "tunepress.json"))["data"]
    assert (found["source"], found["subset"], found["revision"]) == ("ada/rows", "en", "c0ffee")
    assert found["fingerprint"] == data["fingerprint"]
