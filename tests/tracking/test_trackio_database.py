"""Trackio's database on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from pipeline.tracking.trackers import sync
from pipeline.tracking.trackers.trackio import dashboard
from tests.support import REPOSITORY
from tests.support.trackio_server import Run, assert_once_each, configuration, stored_rows


@pytest.fixture
def local(tmp_path) -> Run:
    """A run in a project of its own, because Trackio chooses its folder once a process."""
    return Run(tmp_path / "run", configuration(project=tmp_path.name))


def rows_of(run: Run) -> list[dict]:
    from trackio.utils import TRACKIO_DIR

    return stored_rows(TRACKIO_DIR, run.config.track.project)


def test_run_is_stored_once_with_the_times_of_its_records(local):
    local.train(1, 20)
    local.finish()
    for _ in range(2):
        assert local.send() is None
    rows, records = rows_of(local), local.records()
    assert_once_each(rows, records)
    times = [datetime.fromtimestamp(r["time"], UTC).isoformat() for r in records]
    assert [r["timestamp"] for r in rows if "metrics" in r] == times


def test_trackio_api_finds_events_and_settings(local):
    import trackio

    local.train(1, 2)
    local.finish()
    local.send()
    (run,) = trackio.Api().runs(local.config.track.project)
    assert run.name == "tiny"
    assert {"model": "a/b", "data": "c/d", "method": "qlora"}.items() <= run.config.items()
    titles = [a["title"] for a in run.alerts()]
    assert sorted(titles) == ["quantization_completed", "training_completed", "training_started"]


def test_variables_of_trackio_client_have_no_effect(local, monkeypatch):
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "ada/board")
    local.train(1, 2)
    local.send()
    assert_once_each(rows_of(local), local.records())


def test_network_file_system_uses_files_that_are_imported_once(local, monkeypatch):
    from trackio.server import import_inbox_once

    monkeypatch.setenv("TRACKIO_STORAGE_MODE", "jsonl")
    local.train(1, 5)
    local.finish()
    for _ in range(2):  # the stored records are unknown, so all are sent again
        assert local.send() is None
    assert rows_of(local) == []
    import_inbox_once()
    assert_once_each(rows_of(local), local.records())


def test_unusable_folder_is_named_in_one_line(local, tmp_path):
    (tmp_path / "trackio").write_text("in the way")
    local.train(1, 2)
    code = (
        "import sys; from pathlib import Path; from tests.support.trackio_server import Run, configuration\n"
        "forwarder = Run(Path(sys.argv[1]), configuration()).forwarder()\n"
        "forwarder.close(); print(forwarder.problem)"
    )
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code, str(local.folder)], env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path / 'trackio'}: Trackio's database cannot be used (")
    assert done.stdout.count("\n") == 1


def test_sending_prints_nothing(local, capfd):
    local.train(1, 3)
    local.finish()
    local.send()
    assert "".join(capfd.readouterr()) == ""


def test_sync_of_a_run_without_events_sends_nothing(tmp_path):
    assert sync(tmp_path / "run" / "events.jsonl", configuration()) == 0


def test_unfinished_line_is_skipped_and_the_rest_arrives(local):
    local.train(1, 2)
    with open(local.spool, "a") as spool:
        spool.write('{"time": 1, "run": "ti')
    local.send()
    local.finish()  # the unfinished line becomes a line of its own
    local.send()
    whole = [json.loads(line) for line in local.spool.read_text().splitlines() if line.endswith("}")]
    assert len(whole) == 5
    assert_once_each(rows_of(local), whole)


def test_dashboard_command_names_the_folder_of_the_environment(monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", "/somewhere")
    hint = dashboard(configuration())
    assert hint.startswith("TRACKIO_DIR=/somewhere ") and hint.endswith("trackio show --project tests")
