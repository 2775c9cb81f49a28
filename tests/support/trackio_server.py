"""A real Trackio server on loopback that can be stopped, and spools that grow."""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.loader import parse_config
from pipeline.config.schema import Config
from pipeline.evaluation.overview import headline, side_by_side
from pipeline.evaluation.results import Results
from pipeline.tracking.events import Events
from pipeline.tracking.forwarder import Forwarder
from pipeline.tracking.trackers import opener
from tests.support.server_process import ServerProcess

TOKEN = "writeTokenOfTheTests-0123456789"

RESULTS = {
    model: {
        "size_bytes": size,
        "quality": {
            "held_out": {"perplexity": {"value": value, "stderr": 0.1}, "kl": {"value": 0.01, "stderr": 0.001}}
        },
        "speed": {"stock": {"runs": True, "decode_tokens_per_second": speed, "peak_memory_bytes": 3 * size}},
    }
    for model, size, value, speed in (
        ("base", 4_000_000, 12.5, 40.0),
        ("merged", 4_000_000, 8.25, 41.0),
        ("int8", 2_000_000, 8.26, 45.5),
        ("int4", 1_000_000, 8.875, 60.0),
    )
}
RESULTS["int4"]["gate"] = {"passed": False}

_SERVE = (
    "import sys, uvicorn\n"
    "from trackio.server import build_starlette_app_only\n"
    "app, _ = build_starlette_app_only()\n"
    "uvicorn.run(app, host='127.0.0.1', port=int(sys.argv[1]), log_level='warning')\n"
)


def stored_rows(folder: Path, project: str) -> list[dict]:
    """Everything a Trackio folder holds of a project, as plain rows in the order of storing."""
    if not (folder / f"{project}.db").exists():
        return []
    database = sqlite3.connect(folder / f"{project}.db")
    database.row_factory = sqlite3.Row
    try:
        return [dict(r) for t in ("metrics", "alerts") for r in database.execute(f"select * from {t} order by id")]
    except sqlite3.OperationalError as error:
        assert "no such table" in str(error)  # it is just being made
        return []
    finally:
        database.close()


@dataclass
class TrackioServer(ServerProcess):
    """Trackio's own server in a process of its own. `more` is added to its environment."""

    folder: Path
    more: dict = field(default_factory=dict)
    program = _SERVE
    health = "/version"

    def __post_init__(self):
        self.find_port()

    def start(self) -> TrackioServer:
        plain = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO_")}
        env = plain | {"TRACKIO_DIR": str(self.folder), "TRACKIO_WRITE_TOKEN": TOKEN} | self.more
        self.run_process(30, env=env)
        return self

    def rows(self, project: str = "tests") -> list[dict]:
        return stored_rows(self.folder, project)

    def forget(self, table: str, where: str) -> None:
        """Lose rows of the stopped server's database."""
        database = sqlite3.connect(self.folder / "tests.db")
        with database:
            assert database.execute(f"delete from {table} where {where}").rowcount > 0
        database.close()


@dataclass
class Run:
    """A growing spool as in a run, and its forwarder."""

    folder: Path
    config: Config

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spool = self.folder / "events.jsonl"
        self.events = Events(self.spool, self.config.name)

    def train(self, first: int, last: int) -> None:
        """Write the records of these training steps."""
        if first == 1:
            self.events.emit("train", "started", parameters=10)
        for step in range(first, last + 1):
            self.events.metrics({"train/loss": 1 / step}, step)

    def finish(self) -> None:
        self.events.emit("train", "completed", seconds=1.5)
        self.events.emit("quantize", "completed", "int8", bytes=123)

    def compare(self) -> None:
        """Write the figures of all models, as the end of a run does."""
        rows = side_by_side(Results.model_validate(RESULTS))
        self.events.models(rows, headline(rows))

    def forwarder(self, **options) -> Forwarder:
        return Forwarder(self.spool, opener(self.config), **options)

    def send(self, **options) -> str | None:
        """Send the spool as the end of a run does, and return the problem if there was one."""
        forwarder = self.forwarder(**options)
        forwarder.close()
        return forwarder.problem

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.spool.read_text().splitlines()]


def configuration(name: str = "tiny", **track) -> Config:
    tree = {"name": name, "model": {"source": "a/b"}, "data": {"source": "c/d"}}
    return parse_config(tree | {"track": {"project": "tests"} | track}, "test")


def assert_silence_does_not_delay(folder: Path, seconds: float, close_seconds: float = math.inf, **track: str) -> None:
    """Check that a run with a server that never answers writes 100 steps within `seconds`, and is told why.

    Args:
        close_seconds: within which the tracker is closed, from the first step on.
        track: the settings of the tracker; `{}` stands for the address of the server.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = Run(folder, configuration(**{key: value.format(address) for key, value in track.items()}))
        forwarder = run.forwarder(close_seconds=0.5)
        start = time.monotonic()
        for step in range(1, 101):
            run.train(step, step)
            forwarder.forward()
        assert time.monotonic() - start < seconds
        forwarder.close()
        assert time.monotonic() - start < close_seconds
        assert "no answer" in forwarder.problem


def assert_once_each(rows: list[dict], records: list[dict]) -> None:
    """Check that each record is stored once, unchanged; pictures are another test's matter."""
    from pipeline.tracking.trackers.trackio import PICTURE, as_metrics

    logs = [{k: v for k, v in json.loads(r["metrics"]).items() if k != PICTURE} for r in rows if "metrics" in r]
    alerts = [json.loads(r["text"].partition("\n")[2]) for r in rows if "text" in r]
    key = json.dumps
    assert sorted(map(key, logs)) == sorted(key(as_metrics(r)) for r in records)
    assert sorted(map(key, alerts)) == sorted(key(r) for r in records if "event" in r)
