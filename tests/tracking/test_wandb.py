"""Weights & Biases: its real client, which sends to a server on loopback or writes folders for `wandb sync`."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, MissingExtra, TrackError
from pipeline.tracking.forwarder import Spool
from pipeline.tracking.trackers import check, opener, sync, wandb
from tests.support.server_process import eventually
from tests.support.trackio_server import Run, assert_silence_does_not_delay, configuration
from tests.support.wandb_server import KEY, WandbServer
from tests.support.warm import COLD


@pytest.fixture(autouse=True)
def key(monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return KEY


@pytest.fixture
def server():
    server = WandbServer().start()
    yield server
    server.stop()


@pytest.fixture
def run(server, tmp_path) -> Run:
    """A run that the server shows."""
    return Run(tmp_path / "run", configuration(**server.track))


@pytest.fixture
def offline(tmp_path) -> Run:
    """A run that is written to folders."""
    return Run(tmp_path / "run", configuration(tracker="wandb", mode="offline", folder=str(tmp_path)))


def folders(run: Run) -> list[Path]:
    return sorted(Path(run.config.track.folder, "wandb").glob("offline-run-*"))


def test_finished_run_is_stored_once_with_its_events_and_nothing_of_this_machine(run, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the configuration names the place of a run
    monkeypatch.setenv("WANDB_PROJECT", "other")
    run.train(1, 20)
    run.events.metrics({"train/loss": float("nan"), "train/grad_norm": float("inf")}, 21)
    run.compare()
    run.finish()
    assert run.send(close_seconds=90) is None
    server.assert_once_each(run.records())
    stored = server.run
    assert (stored.display, stored.project, stored.state) == ("tiny", "tests", "finished")
    settings = {name: value["value"] for name, value in json.loads(stored.config).items() if name != "_wandb"}
    assert settings == {"model": "a/b", "data": "c/d", "method": "qlora"}
    alerts = [(alert["title"], alert["severity"]) for alert in stored.alerts]
    assert alerts == [(name, "INFO") for name in ("training_started", "training_completed", "quantization_completed")]
    table, picture = (
        next(file for name, file in stored.files.items() if name.endswith(end)) for end in ("html", "png")
    )
    assert b"<th>model</th>" in table and b"<td>base model</td><td>4.0</td><td>12.5</td>" in table
    assert picture.startswith(b"\x89PNG")
    told = json.dumps(stored.config) + str([name for name in stored.files])
    for private in (socket.gethostname(), os.getcwd(), "requirements", "metadata", "output.log", ".py"):
        assert private not in told
    assert not any("otel" in request or "sentry" in request for request in server.requests)
    assert "".join(capfd.readouterr()) == ""
    written = b"".join(path.read_bytes() for path in run.folder.parent.rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_records_that_are_sent_again_are_stored_once(run, server):
    run.train(1, 5)
    for _ in range(2):  # as after a kill before the answer arrived
        spool = Spool(run.spool)
        items = spool.read()
        tracker = opener(run.config)(spool.id, spool.began)
        tracker.send(items)
        assert tracker.stored() == (6, None)
        tracker.close()
        server.assert_once_each(run.records())
    assert len(server.run.alerts) == 1


@pytest.mark.slow
def test_failed_run_is_shown_as_failed_also_after_a_sync_without_news(run, server):
    run.events.failed("train", None, ValueError("no luck"))
    assert run.send(close_seconds=90) is None
    assert sync(run.spool, run.config) == 0
    assert server.run.state == "failed"
    assert [(alert["title"], alert["severity"]) for alert in server.run.alerts] == [("training_failed", "ERROR")]


@pytest.mark.slow
def test_server_that_was_away_gets_every_record_once(run, server):
    run.train(1, 20)
    forwarder = run.forwarder(close_seconds=90)
    forwarder.forward()
    eventually(lambda: server.count() == 21, seconds=60)
    server.stop()
    run.train(21, 40)
    forwarder.forward()
    eventually(lambda: forwarder.problem is not None, seconds=90)
    assert server.url in forwarder.problem and "\n" not in forwarder.problem
    with pytest.raises(TrackError, match="no answer"):
        sync(run.spool, run.config)
    server.start()
    run.finish()
    forwarder.close()
    assert forwarder.problem is None
    server.assert_once_each(run.records())
    assert sync(run.spool, run.config) == 0


def test_refused_key_is_told_in_one_line_and_never_shown(run, server, monkeypatch):
    wrong = "f" * 40
    monkeypatch.setenv("WANDB_API_KEY", wrong)
    run.train(1, 2)
    problem = run.send(close_seconds=90)
    assert problem == f"Weights & Biases at {server.url}: refuses the key. Try: set WANDB_API_KEY, or `wandb login`"
    assert server.runs == {}


def test_silent_server_does_not_delay_a_run(tmp_path):
    assert_silence_does_not_delay(tmp_path / "run", 5, tracker="wandb", server="{}")


def test_offline_runs_are_complete_folders_and_later_records_another(offline):
    offline.train(1, 5)
    assert offline.send(close_seconds=90) is None
    (first,) = folders(offline)
    assert json.loads((first / "tunepress.json").read_text()) == {"records": 6}
    assert sync(offline.spool, offline.config) == 0
    offline.finish()
    assert sync(offline.spool, offline.config) == 2
    first_again, second = folders(offline)
    assert first_again == first and json.loads((second / "tunepress.json").read_text()) == {"records": 8}


@pytest.mark.slow
def test_folder_that_a_kill_left_incomplete_is_written_again(offline):
    offline.train(1, 5)
    spool = Spool(offline.spool)
    items = spool.read()
    opener(offline.config)(spool.id, spool.began).send(items[:3])  # its process ends without finishing
    (incomplete,) = folders(offline)
    time.sleep(1)  # folders are named after the second
    assert offline.send(close_seconds=90) is None
    (whole,) = folders(offline)
    assert whole != incomplete and json.loads((whole / "tunepress.json").read_text()) == {"records": 6}


@pytest.mark.slow
def test_wandb_sync_makes_one_run_of_the_folders(offline, server):
    offline.train(1, 5)
    offline.send(close_seconds=90)
    time.sleep(1)  # folders are named after the second
    offline.finish()
    offline.send(close_seconds=90)
    assert server.runs == {} and len(folders(offline)) == 2
    command = [str(Path(COLD).with_name("wandb")), "sync", "--yes", *map(str, folders(offline))]
    environment = os.environ | {"WANDB_BASE_URL": server.url}
    subprocess.run(command, env=environment, cwd=offline.folder, check=True, capture_output=True)
    server.assert_once_each(offline.records())


def test_missing_key_folder_and_package_are_told_before_a_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    online = configuration(tracker="wandb").track
    with pytest.raises(TrackError, match="no key for https://api.wandb.ai. Try: set WANDB_API_KEY, or `wandb login`"):
        check(online)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    check(online)
    with pytest.raises(TrackError, match=r"no such folder. Try: mkdir -p"):
        check(configuration(tracker="wandb", mode="offline", folder=str(tmp_path / "no")).track)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'tunepress\[wandb\]'"):
        check(online)


def test_server_with_a_login_in_its_address_is_refused():
    with pytest.raises(ConfigError, match="track.server"):
        configuration(tracker="wandb", server="https://wandb.example.org/?team=a")


def test_dashboard_is_the_project_or_the_command_that_sends_the_folders():
    assert wandb.dashboard(configuration(tracker="wandb", entity="ada")) == "https://wandb.ai/ada/tests"
    offline = configuration(tracker="wandb", mode="offline", folder="boards")
    assert wandb.dashboard(offline) == "wandb sync boards/wandb/offline-run-*"
