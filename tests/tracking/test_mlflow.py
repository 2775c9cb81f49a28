"""MLflow: a real database on this machine, and a real tracking server on loopback."""

from __future__ import annotations

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipeline.errors import ConfigError, MissingExtra, TrackError
from pipeline.tracking.forwarder import Spool
from pipeline.tracking.trackers import check, mlflow, opener, sync
from tests.support.mlflow_server import MlflowServer, MlflowStore
from tests.support.server_process import eventually
from tests.support.trackio_server import Run, assert_silence_does_not_delay, configuration


@pytest.fixture
def store(tmp_path, empty_mlflow) -> MlflowStore:
    return MlflowStore(tmp_path / "mlflow", empty_mlflow)


@pytest.fixture
def server(tmp_path, empty_mlflow):
    server = MlflowServer(tmp_path / "server", empty_mlflow).start()
    yield server
    server.stop()


def run_of(place: MlflowStore, folder) -> Run:
    return Run(folder / "run", configuration(**place.track))


def test_finished_run_is_stored_once_with_times_steps_and_settings(store, tmp_path, capfd):
    run = run_of(store, tmp_path)
    run.train(1, 20)
    run.events.metrics({"train/loss": float("nan"), "train/grad_norm": float("inf")}, 21)
    run.finish()
    for _ in range(2):
        assert run.send(close_seconds=60) is None
    store.assert_once_each(run.records())
    assert store.rows("select name, status from runs") == [("tiny", "FINISHED")]
    assert dict(store.rows("select key, value from params")) == {"model": "a/b", "data": "c/d", "method": "qlora"}
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("takes_equal_points", [False, True])
def test_records_that_are_sent_again_are_stored_once(store, tmp_path, takes_equal_points):
    """MLflow's databases store an equal point once, but its interface does not promise that."""
    if takes_equal_points:
        store.take_equal_points()
    run = run_of(store, tmp_path)
    run.train(1, 5)
    run.events.metrics({"train/loss": float("nan"), "train/grad_norm": float("inf")}, 6)
    for _ in range(2):  # as after a kill before the answer arrived
        spool = Spool(run.spool)
        items = spool.read()
        tracker = opener(run.config)(spool.id, spool.began)
        tracker.send(items)
        assert tracker.stored() == (7, 1)
        store.assert_once_each(run.records())


def test_many_records_are_divided_into_requests_that_mlflow_takes(store, tmp_path):
    run = run_of(store, tmp_path)
    for number in range(120):
        run.events.emit("quantize", "started", f"v{number}")
        run.events.metrics({f"train/figure_{each}": float(each) for each in range(12)}, number)
    assert run.send(close_seconds=60) is None
    store.assert_once_each(run.records())


def test_all_models_are_a_table_and_a_picture(store, tmp_path):
    run = run_of(store, tmp_path)
    run.train(1, 2)
    run.compare()
    assert run.send(close_seconds=60) is None
    (table,) = store.folder.rglob("models.csv")
    header, base, *_ = table.read_text().splitlines()
    assert header.startswith("model,") and base.startswith("base model,4.0,12.5,")
    assert (table.parent / "perplexity_against_size.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("end", "status"), [(ValueError("no luck"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_run_has_the_status_of_its_last_event(store, tmp_path, end, status):
    run = run_of(store, tmp_path)
    run.events.failed("train", None, end)
    run.send(close_seconds=60)
    assert store.rows("select status from runs") == [(status,)]
    run.finish()
    run.send(close_seconds=60)
    assert store.rows("select status from runs") == [("FINISHED",)]


@pytest.mark.slow
def test_server_that_was_away_gets_every_record_once(server, tmp_path):
    run = run_of(server, tmp_path)
    run.train(1, 20)
    forwarder = run.forwarder(close_seconds=60)
    forwarder.forward()
    eventually(lambda: server.count() == 21, seconds=60)
    server.stop()
    run.train(21, 40)
    forwarder.forward()
    eventually(lambda: forwarder.problem is not None, seconds=60)
    assert server.url in forwarder.problem and "no answer" in forwarder.problem and "\n" not in forwarder.problem
    with pytest.raises(TrackError, match="no answer"):
        sync(run.spool, run.config)
    server.start()
    run.compare()
    run.finish()
    forwarder.close()
    assert forwarder.problem is None
    server.assert_once_each(run.records())
    assert list(server.folder.rglob("perplexity_against_size.png"))
    assert sync(run.spool, run.config) == 0


def test_silent_server_does_not_delay_a_run(tmp_path):
    assert_silence_does_not_delay(tmp_path / "run", 5, tracker="mlflow", uri="{}")


class _Refusing(BaseHTTPRequestHandler):
    """A server that accepts no login."""

    def do_GET(self):
        body = json.dumps({"error_code": "UNAUTHENTICATED", "message": "no"}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


def test_refused_login_is_told_in_one_line_without_the_token(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tokenOfTheTests-0123456789")
    refusing = HTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=refusing.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{refusing.server_port}"
        run = Run(tmp_path / "run", configuration(tracker="mlflow", uri=address))
        run.train(1, 2)
        problem = run.send(close_seconds=60)
    finally:
        refusing.shutdown()
        refusing.server_close()
    assert problem.startswith(f"track.uri {address}: the server refuses the login. Try: export MLFLOW_TRACKING_TOKEN=")
    assert "tokenOfTheTests" not in problem and "\n" not in problem


def test_missing_package_and_missing_folder_are_told_before_a_run(tmp_path, monkeypatch):
    missing = configuration(tracker="mlflow", uri=f"sqlite:///{tmp_path}/no/mlflow.db").track
    with pytest.raises(TrackError, match=r"no such folder .*Try: mkdir -p"):
        check(missing)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'tunepress\[mlflow\]'"):
        check(configuration(tracker="mlflow").track)
    run = Run(tmp_path / "run", configuration(tracker="mlflow"))
    run.train(1, 2)
    with pytest.raises(MissingExtra, match=r"pip install 'tunepress\[mlflow\]'"):
        sync(run.spool, run.config)


@pytest.mark.parametrize("uri", ["https://ada:secret@mlflow.example.org", "mlruns", "https://x/?token=abcdefgh"])
def test_addresses_with_a_login_and_other_stores_are_refused(uri):
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_TOKEN|contains a token"):
        configuration(tracker="mlflow", uri=uri)


def test_dashboard_is_the_server_or_the_command_that_shows_the_database():
    assert mlflow.dashboard(configuration(tracker="mlflow", uri="https://m.example.org")) == "https://m.example.org"
    assert mlflow.dashboard(configuration(tracker="mlflow")) == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
