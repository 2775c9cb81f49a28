"""A self-hosted Trackio server: what it receives, and how it recovers."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import TrackError
from pipeline.tracking.forwarder import Spool
from pipeline.tracking.trackers import sync
from pipeline.tracking.trackers.places import Server
from pipeline.tracking.trackers.trackio import TrackioTracker, dashboard
from pipeline.workflow.workspace import Workspace
from tests.support.server_process import eventually
from tests.support.trackio_server import TOKEN, Run, assert_once_each, assert_silence_does_not_delay, configuration


def test_finished_run_is_stored_once_with_its_name_and_steps(run, server):
    run.train(1, 30)
    run.finish()
    assert run.send() is None
    rows = server.rows()
    assert_once_each(rows, run.records())
    assert {r["run_name"] for r in rows} == {"tiny"} and len({r["run_id"] for r in rows}) == 1
    assert [r["step"] for r in rows if "metrics" in r] == [0, *range(1, 31), 30, 30]
    assert {r["level"] for r in rows if "text" in r} == {"info"}


def test_restarted_server_has_every_record_once(run, server):
    run.train(1, 20)
    forwarder = run.forwarder()
    forwarder.forward()
    eventually(lambda: len(server.rows()) == 22)
    server.stop()
    run.train(21, 40)
    forwarder.forward()
    eventually(lambda: forwarder.problem is not None)
    assert f"127.0.0.1:{server.port}" in forwarder.problem
    run.train(41, 60)
    server.start()
    eventually(lambda: len(server.rows()) == 62)  # by the same forwarder, without another call
    run.finish()
    forwarder.close()
    assert forwarder.problem is None
    assert_once_each(server.rows(), run.records())


def test_next_run_sends_missed_records(run, server):
    server.stop()
    run.train(1, 20)
    assert run.send()
    server.start()
    run.finish()
    assert run.send() is None
    assert_once_each(server.rows(), run.records())


def test_sync_sends_what_was_missed_and_then_nothing(run, server):
    server.stop()
    run.train(1, 250)  # more than one request
    run.finish()
    workspace = Workspace(run.folder)
    with pytest.raises(TrackError, match="no answer"):
        sync(workspace.events_path, run.config)
    server.start()
    assert sync(workspace.events_path, run.config) == 253
    assert sync(workspace.events_path, run.config) == 0
    assert_once_each(server.rows(), run.records())


@pytest.mark.parametrize(("table", "where"), [("metrics", "step in (3, 11)"), ("alerts", "true")])
def test_rows_that_the_server_lost_are_sent_again(run, server, table, where):
    run.train(1, 20)
    forwarder = run.forwarder()
    forwarder.forward()
    eventually(lambda: len(server.rows()) == 22)
    server.stop()
    server.forget(table, where)
    server.start()
    run.finish()
    forwarder.close()
    assert forwarder.problem is None
    assert_once_each(server.rows(), run.records())


def test_records_that_are_sent_again_are_stored_once(run, server):
    run.train(1, 5)
    for _ in range(3):  # as after a kill before the answer arrived
        spool = Spool(run.spool)
        items = spool.read()
        tracker = TrackioTracker(run.config, Server(server.url), spool.id, spool.began)
        tracker.send(items)
        assert tracker.stored() == (6, 1)
    assert_once_each(server.rows(), run.records())


def test_fresh_start_does_not_overwrite_the_old_curve(run, server):
    for _ in range(2):
        run.train(1, 3)
        run.send()
        run.spool.unlink()
    rows = server.rows()
    assert {r["run_name"] for r in rows} == {"tiny"}
    curves: dict[str, list[int]] = {}
    for row in rows:
        if "metrics" in row:
            curves.setdefault(row["run_id"], []).append(row["step"])
    assert list(curves.values()) == [[0, 1, 2, 3]] * 2


def test_nan_and_infinite_metrics_are_sent(run, server):
    run.events.metrics({"train/loss": float("nan"), "train/grad_norm": float("inf")}, 1)
    run.finish()
    assert run.send() is None
    assert_once_each(server.rows(), run.records())


def test_failure_is_an_alert_at_level_error_and_a_stop_by_the_user_a_warning(run, server):
    for end in (ValueError("no luck"), KeyboardInterrupt(), "killed by the system"):
        run.events.failed("train", None, end)
    run.send()
    alerts = [r for r in server.rows() if "text" in r]
    assert {alert["title"] for alert in alerts} == {"training_failed"}
    told = {json.loads(alert["text"].partition("\n")[2])["message"]: alert["level"] for alert in alerts}
    assert told == {"no luck": "error", "stopped by the user": "warn", "killed by the system": "error"}
    assert any("training stopped by the user\n" in alert["text"] for alert in alerts)


def test_silent_server_does_not_delay_a_run(tmp_path):
    assert_silence_does_not_delay(tmp_path / "run", 1.5, 3, server="{}")


def test_other_server_is_refused(tmp_path):
    from tests.support.hub import LoopbackHub

    with LoopbackHub(tmp_path / "hub", {}) as hub:
        run = Run(tmp_path / "run", configuration(server=hub.url))
        run.train(1, 2)
        assert hub.url in run.send()


def test_wrong_token_is_refused_in_one_line_and_never_shown(run, server, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "aWrongToken-987654321")
    run.train(1, 2)
    problem = run.send()
    assert "write_token" in problem and "\n" not in problem
    assert server.rows() == []
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", TOKEN)
    assert run.send() is None and len(server.rows()) == 4
    told = "".join(capfd.readouterr()) + run.spool.read_text() + str(server.rows())
    written = b"".join(p.read_bytes() for p in run.folder.parent.rglob("*") if p.is_file())
    for token in (TOKEN, "aWrongToken-987654321"):
        assert token not in told and token.encode() not in written


def test_dashboard_is_at_the_address_of_the_server():
    config = configuration(server="https://trackio.example.org/")
    assert dashboard(config) == "https://trackio.example.org/?project=tests"
