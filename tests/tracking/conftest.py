"""A self-hosted Trackio server, and a run that it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trackio_server import TOKEN, Run, TrackioServer, configuration


@pytest.fixture(autouse=True)
def write_token(monkeypatch) -> str:
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", TOKEN)
    return TOKEN


@pytest.fixture
def server(tmp_path):
    server = TrackioServer(tmp_path / "server").start()
    yield server
    server.stop()


@pytest.fixture
def run(server, tmp_path) -> Run:
    """A run that the server shows."""
    return Run(tmp_path / "run", configuration(server=server.url))


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory) -> Path:
    """MLflow's database without runs, for copies."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
