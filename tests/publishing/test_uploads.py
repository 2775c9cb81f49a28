"""Uploads: only changed content, once, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import HubError
from pipeline.system.files import Digest
from tests.support.fake_runs import REPO, sent_bytes, uploads, weights
from tests.support.hub.store import Entry


def test_the_repository_becomes_the_release_to_the_byte(hub, finished):
    finished.publish()
    local = {p.relative_to(finished.release).as_posix(): p for p in finished.release.rglob("*") if p.is_file()}
    assert set(hub.files(REPO)) - {".gitattributes"} == set(local)
    for name, path in local.items():
        assert hub.read(REPO, name) == path.read_bytes(), name


def test_publishing_again_sends_only_what_the_hub_lacks(hub, finished):
    finished.publish()
    commits, requests = hub.commits(REPO), len(hub.requests)
    summary = finished.publish()
    assert (summary["files_sent"], summary["bytes_sent"]) == (0, 0)
    assert sent_bytes(hub, requests) == 0 and {r.method for r in hub.requests[requests:]} == {"GET"}
    assert hub.commits(REPO) == commits
    hub.put(REPO, {"int8/model.safetensors": None})
    assert finished.publish()["files_sent"] == 1 and "int8/model.safetensors" in hub.files(REPO)


def test_publishing_from_another_copy_of_the_same_run_sends_nothing(hub, finished, tmp_path):
    finished.publish()
    commits = hub.commits(REPO)
    for document in ("README.md", "tunepress.json", "int8/README.md", "assets/quality_vs_size.png"):
        (finished.release / document).unlink()
    finished.publish()
    assert hub.commits(REPO) == commits and (finished.release / "README.md").read_bytes() == hub.read(REPO, "README.md")


def test_models_that_are_there_are_not_read_again(hub, finished):
    """The ledger knows what they hold; reading this one would take minutes, and give another digest."""
    finished.publish()
    with open(finished.release / "model.safetensors", "r+b") as file:
        file.truncate(2**38)
    state, digest = (finished.release / "model.safetensors").stat(), "ab" * 32
    made = finished.workspace.ledger()["merge"]
    known = {"release/model.safetensors": Digest(digest, state.st_size, state.st_mtime_ns)}
    finished.workspace.record("merge", replace(made, outputs=made.outputs | known))
    head = hub.repo(REPO).resolve("main")
    files = dict(head.files) | {"model.safetensors": Entry.of_lfs(digest, state.st_size)}
    hub.repo(REPO).move("main", hub.repo(REPO).add_commit(head, files, title="sent before", author="ada"))
    requests = len(hub.requests)
    finished.publish()
    assert uploads(hub, requests) == []
    assert json.loads(hub.read(REPO, "tunepress.json"))["files"]["model.safetensors"]["sha256"] == digest


def test_a_changed_variant_sends_its_own_files_and_the_documents(hub, finished):
    finished.publish()
    before, requests = hub.files(REPO), len(hub.requests)
    changed = weights()
    finished.make("quantize/int4", {"int4/config.json": b'{"q": "int4"}', "int4/model.safetensors": changed})
    (finished.release / "int4" / "tokenizer.json").unlink()
    int4 = finished.workspace.read_measurement("int4")
    finished.workspace.write_measurement("int4", int4 | {"size_bytes": 3000})
    finished.publish()
    assert len(changed) in uploads(hub, requests) and len(uploads(hub, requests)) == 2  # and the picture
    assert set(before) - set(hub.files(REPO)) == {"int4/tokenizer.json"}
    old, new = (hub.commit_files(REPO, c) for c in hub.commits(REPO)[1::-1])
    documents = {"README.md", "tunepress.json", "int4/README.md", "assets/quality_vs_size.png"}
    assert {p for p in new if new[p] != old.get(p)} == {"int4/model.safetensors", *documents}


def test_the_same_content_at_several_paths_is_sent_once(hub, finished):
    same = weights(4000)
    finished.make("merge", {"model.safetensors": same, "adapter/adapter_model.safetensors": same})
    finished.make("quantize/int8", {"int8/model.safetensors": same})
    finished.publish()
    assert uploads(hub).count(4000) == 1
    for path in ("model.safetensors", "adapter/adapter_model.safetensors", "int8/model.safetensors"):
        assert hub.read(REPO, path) == same


def test_a_variant_that_left_the_release_leaves_the_repository_whole(hub, finished):
    finished.publish()
    hub.put(REPO, {"int4/notes.md": b"mine"})
    finished.publish(("int8",))
    assert [name for name in hub.files(REPO) if name.startswith("int4/")] == ["int4/notes.md"]
    assert not (finished.release / "int4").exists()


def test_bytes_sent_are_those_that_the_hub_lacked(hub, finished):
    first = finished.publish()["bytes_sent"]
    assert sum(uploads(hub)) < first <= sent_bytes(hub)
    finished.publish(("int8",))
    finished.make_variant("int4")
    requests = len(hub.requests)
    back = finished.publish()
    assert uploads(hub, requests) == [] and "int4/model.safetensors" in hub.files(REPO)
    assert 0 < back["bytes_sent"] == sent_bytes(hub, requests) < first


def test_foreign_file_in_the_way_is_named_and_left(hub, finished):
    hub.put(REPO, {"int8/config.json": b"mine"})
    with pytest.raises(HubError, match="tunepress did not put int8/config.json there"):
        finished.publish()
    assert hub.read(REPO, "int8/config.json") == b"mine" and len(hub.files(REPO)) == 2


def test_progress_tells_files_and_bytes_and_ends_with_all_of_them(hub, finished, monkeypatch):
    monkeypatch.setattr("pipeline.publishing.upload.BATCH_BYTES", 0)
    finished.publish()
    told = [report for report in finished.progress if "sending" in report[2]]
    done, totals = [d for d, _, _ in told], {t for _, t, _ in told}
    assert len(totals) == 1 and done == sorted(done) and done[0] == 0 and done[-1] == totals.pop()
    assert any("model.safetensors (" in what for _, _, what in told)


def test_progress_moves_within_a_large_file(hub, finished, monkeypatch):
    monkeypatch.setattr("pipeline.publishing.upload.WATCH_SECONDS", 0.02)
    size = 40_000_000
    finished.make("quantize/int8", {"int8/model.safetensors": bytes(size), "int8/config.json": b"{}"})
    hub.fault(r"PUT ", stall=0.3)
    finished.publish()
    inside = {d for d, t, what in finished.progress if "int8/model.safetensors" in what and 0 < d < t}
    assert inside


def test_the_lineage_lists_every_file_and_no_path_of_this_machine(hub, finished, tmp_path):
    gone = tmp_path / "secret-place" / "rows.jsonl"  # it was there when it was trained on
    finished.configure(data={"source": str(gone), "revision": None})
    finished.publish()
    lineage = json.loads(hub.read(REPO, "tunepress.json"))
    assert {*lineage["files"], *lineage["documents"], "tunepress.json", ".gitattributes"} == set(hub.files(REPO))
    assert str(tmp_path) not in hub.read(REPO, "tunepress.json").decode()
    assert lineage["configuration"]["data"]["source"] == "rows.jsonl"


def test_lineage_names_neither_tracking_server_nor_local_paths(hub, finished):
    finished.configure(track={"project": "p", "server": "http://10.1.2.3:7860"})
    int8, kernels = finished.workspace.read_measurement("int8"), Path.home() / "kernels" / "mm.so"
    reason = f"OSError: {finished.release}/int8/model.safetensors: {kernels} of {Path.home()}s is missing"
    finished.workspace.write_measurement("int8", int8 | {"speed": {"stock": {"runs": False, "reason": reason}}})
    finished.publish()
    lineage = json.loads(hub.read(REPO, "tunepress.json"))
    assert "track" not in lineage["configuration"] and "10.1.2.3" not in json.dumps(lineage)
    told = f"OSError: demo/release/int8/model.safetensors: ~/kernels/mm.so of {Path.home()}s is missing"
    assert lineage["results"]["int8"]["speed"]["stock"]["reason"] == told
