"""Records of decisions and summaries for CI: harmless if unreadable or unwritable."""

from __future__ import annotations

import shutil

from pipeline.retraining.decision import Record
from pipeline.retraining.report import Summary


def test_unreadable_record_is_ignored(tmp_path):
    path = tmp_path / ".tiny.retraining.json"
    for content in (b"", b"{", b"[]", b"\xff", b'{"of": "another version"}'):
        path.write_bytes(content)
        assert Record.read(path) == Record()


def test_late_summary_failure_keeps_the_decision(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    (tmp_path / "ci").mkdir()
    summary = Summary.open(tmp_path / "ci" / "told.md")
    shutil.rmtree(tmp_path / "ci")
    (problem,) = summary.append("## Published\n")
    assert problem.startswith("--summary ") and (tmp_path / "step.md").read_text() == "## Published\n"
