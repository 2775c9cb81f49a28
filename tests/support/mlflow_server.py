"""MLflow's database of a run, on this machine or behind a real tracking server on loopback that can be stopped."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.tracking.trackers.contents import as_text
from tests.support.server_process import ServerProcess

# MLflow's own program imports what only its pages need.
_SERVE = (
    "import os, sys\n"
    "os.environ['_MLFLOW_SERVER_FILE_STORE'] = 'sqlite:///mlflow.db'\n"
    "os.environ['_MLFLOW_SERVER_ARTIFACT_ROOT'] = 'mlflow-artifacts:/'\n"
    "os.environ['_MLFLOW_SERVER_ARTIFACT_DESTINATION'] = 'artifacts'\n"
    "os.environ['_MLFLOW_SERVER_SERVE_ARTIFACTS'] = 'true'\n"
    "from mlflow.server import app\n"
    "from werkzeug.serving import run_simple\n"
    "run_simple('127.0.0.1', int(sys.argv[1]), app, threaded=True)\n"
)


@dataclass
class MlflowStore:
    """A folder with MLflow's database; `empty` is one without runs, because making one takes seconds."""

    folder: Path
    empty: Path

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.empty, self.database)

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    @property
    def track(self) -> dict:
        return {"tracker": "mlflow", "uri": f"sqlite:///{self.database}"}

    def rows(self, query: str) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return database.execute(query).fetchall()

    def take_equal_points(self) -> None:
        """Let the database store a point again that it has."""
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            database.executescript(
                "create table others as select * from metrics; drop table metrics;alter table others rename to metrics;"
            )

    def points(self) -> list[tuple]:
        """Return all points of all curves: name, milliseconds, step, value; "nan" stands for itself."""
        found = self.rows("select key, timestamp, step, value, is_nan from metrics")
        return [(key, moment, step, "nan" if is_nan else value) for key, moment, step, value, is_nan in found]

    def tags(self) -> dict[str, str]:
        return dict(self.rows("select key, value from tags"))

    def count(self) -> int:
        """Return how many points and events are stored."""
        return len(self.points()) + sum(name.startswith("event.") for name in self.tags())

    def assert_once_each(self, records: list[dict]) -> None:
        """Check that one run holds each record once, with its time and step."""
        points, events, step = [], {}, 0
        for number, record in enumerate(records):
            step = record.get("step", step)
            for key, value in record.get("metrics", {}).items():
                told = "nan" if math.isnan(value) else min(value, sys.float_info.max)
                points.append((key, round(record["time"] * 1000), step, told))
            if "event" in record:
                events[f"event.{number:05d}.{record['event']}"] = as_text(record)
        assert sorted(self.points(), key=str) == sorted(points, key=str)
        assert {name: text for name, text in self.tags().items() if name.startswith("event.")} == events
        assert len(self.rows("select run_uuid from runs")) == 1


@dataclass
class MlflowServer(ServerProcess, MlflowStore):
    """MLflow's own server in a process of its own."""

    program = _SERVE
    health = "/health"

    def __post_init__(self):
        super().__post_init__()
        self.find_port()

    @property
    def track(self) -> dict:
        return {"tracker": "mlflow", "uri": self.url}

    def start(self) -> MlflowServer:
        env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        self.run_process(60, env=env, cwd=self.folder, stderr=subprocess.DEVNULL)
        return self
