"""The ledger: what it keeps, whoever writes, and what it refuses."""

from __future__ import annotations

import json
import os

import pytest

from pipeline.errors import WorkspaceError
from pipeline.system.files import write_text
from pipeline.workflow.ledger import BaseModel, Digest, Entry, Ledger, read_ledger, write_ledger
from pipeline.workflow.workspace import Workspace

EMPTY = {"steps": {}, "inputs": {}, "base": None, "comparison": None}
DIGEST = {"sha256": "0" * 64, "size": 1, "mtime_ns": 1}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "run")
    workspace.folder.mkdir()
    return workspace


def test_ledger_is_read_as_it_was_written(tmp_path):
    entry = Entry("f", {"adapter/a": Digest("0" * 64, 1, 2)}, {"steps": 3}, 4.0, 5.0, {"plan": {"steps": 6}})
    ledger = Ledger(
        {"train": entry}, {"rows": {"rows": Digest("1" * 64, 3, 4)}}, BaseModel({}, "/model"), {"published": None}
    )
    write_ledger(tmp_path / "ledger.json", ledger)
    assert read_ledger(tmp_path / "ledger.json", tmp_path) == ledger


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"steps": []}',
        json.dumps({**EMPTY, "steps": {"train": {"outputs": {}, "state": "perhaps"}}}),
        json.dumps({**EMPTY, "steps": {"train": {"outputs": {"adapter": {"sha256": "0"}}}}}),
        json.dumps({**EMPTY, "steps": {"train": {"outputs": {"../outside": DIGEST}}}}),
        json.dumps({**EMPTY, "inputs": {"rows": {"rows": 1}}}),
        json.dumps({**EMPTY, "base": {"place": "/model"}}),
        json.dumps({"train": {"fingerprint": 1}}),  # as an earlier release wrote it
    ],
)
def test_damaged_ledger_is_refused_by_name(workspace, content):
    write_text(workspace.ledger_path, content)
    with pytest.raises(WorkspaceError, match=f"^{workspace.ledger_path}: damaged. Try: remove it"):
        workspace.ledger()


def test_step_that_was_never_finished_is_not_done_and_keeps_its_progress(workspace):
    workspace.note("train", plan={"steps": 7})
    assert workspace.ledger() == {} and not workspace.holds("train", "")
    assert workspace.read_ledger().steps["train"].state == "running"
    workspace.record("train", Entry("f"))
    assert workspace.holds("train", "f") and workspace.progress("train", "plan") == {"steps": 7}
    workspace.note("train", plan=None)
    assert workspace.holds("train", "f") and workspace.progress("train", "plan") == {}


def test_step_that_is_done_again_keeps_its_outputs_until_then(workspace):
    write_text(workspace.folder / "adapter", "weights")
    workspace.record("train", Entry("f", workspace.digests([workspace.folder / "adapter"])))
    workspace.note("train")
    assert workspace.holds("train", "f")
    workspace.undo("train")
    assert not workspace.ledger() and (workspace.folder / "adapter").exists()


def test_processes_that_write_at_once_lose_nothing(workspace):
    children = []
    for name in "ab":
        child = os.fork()
        if not child:
            for number in range(50):
                workspace.note(f"{name}{number}", number={"is": number})
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert len(workspace.read_ledger().steps) == 100
