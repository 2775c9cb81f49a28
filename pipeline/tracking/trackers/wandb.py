"""Weights & Biases: the curves of training and the events of a run, sent by its own client in a process of its own.

Its client takes over the exit of a process, interrupts the main thread if somebody presses Stop on its page, and waits
for the network when a process ends. A run must not notice any of this, so `wandb_sender` is a process of its own,
which can be ended at any moment.

A record is one row of the run's history, and its step there is its place in the spool. The last step that is stored
therefore says which records are missing. Curves are drawn over `step`, the training step. An event is a row with its
name and its values, and after that an alert. An alert is a notification: it is sent at most once.

With `mode: offline` a run is one or more folders for `wandb sync`, which appends them to one run. A folder counts when
it is complete. Folders that a kill has left incomplete are removed and written again.
"""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from pipeline.config.schema import Config
from pipeline.config.track import WandbSettings
from pipeline.errors import TrackError
from pipeline.evaluation.overview import draw_side_by_side
from pipeline.system.process_environment import with_own_package
from pipeline.tracking.events import alert_level
from pipeline.tracking.forwarder import Item
from pipeline.tracking.trackers.contents import as_text, event_values, models_table, run_settings

LABEL = "Weights & Biases"
REQUIRES = (("wandb", "wandb"),)
SECRETS = ("WANDB_API_KEY",)
SERVICE, PAGES = "https://api.wandb.ai", "https://wandb.ai"
TABLE, PICTURE = "models", "models/perplexity_against_size"  # their names in a run
SECONDS = {"open": 25.0, "send": 40.0, "stored": 20.0, "close": 20.0}  # the longest time of each request
# Its client would try again for minutes, while the forwarder tries again anyway. And nothing about it is reported.
_PATIENCE = {
    "WANDB__GRAPHQL_RETRY_MAX": "1",
    "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "1",
    "WANDB__GRAPHQL_TIMEOUT_SECONDS": "10",
    "WANDB_ERROR_REPORTING": "false",
}
# The only variables of its client that have an effect: the configuration names the place of a run.
_KEPT = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
_LOG_IN = f"Try: set {SECRETS[0]}, or `wandb login`"


def check(track: WandbSettings) -> None:
    """Raise if settings cannot work. A server that does not answer now gets the events later.

    Raises:
        TrackError: if there is no key, or the folder of offline runs does not exist.
    """
    if track.mode == "offline" and not Path(track.folder).is_dir():
        raise TrackError(f"track.folder {track.folder}: no such folder. Try: mkdir -p {track.folder}")
    if track.mode == "online" and not _has_login(track):
        raise TrackError(f"track.tracker {track.tracker}: no key for {_server(track)}. {_LOG_IN}")


def connect(config: Config, run_id: str, began: float) -> WandbTracker:
    """Return an open tracker of one run."""
    return WandbTracker(config, run_id)


def dashboard(config: Config) -> str:
    """Return the address of the project, or the command that sends offline runs."""
    track = cast(WandbSettings, config.track)
    if track.mode == "offline":
        return f"wandb sync {Path(track.folder, 'wandb')}/offline-run-*"
    return "/".join(filter(None, (track.server or PAGES, track.entity, track.project)))


def place(track: WandbSettings) -> str:
    """Return the name of the place that shows a run."""
    return str(Path(track.folder, "wandb")) if track.mode == "offline" else track.server or PAGES


def state() -> dict:
    """Return the default folder of offline runs, and whether there is a key for the service."""
    defaults = WandbSettings(tracker="wandb")
    return {"folder": str(Path(defaults.folder, "wandb").absolute()), "key_set": _has_login(defaults)}


class WandbTracker:
    """One run of one W&B project, written by a process of its own.

    Args:
        run_id: id of the run, 32 hex digits.

    Raises:
        TrackError: if the server does not answer, or refuses the key.
    """

    def __init__(self, config: Config, run_id: str):
        self._track, self._exit_code = cast(WandbSettings, config.track), 0
        check(self._track)
        self._scratch = tempfile.mkdtemp(prefix="tunepress-wandb-")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_") or key in _KEPT}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__name__}_sender", self._scratch],
            env=with_own_package(environment) | _PATIENCE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        about = {
            "id": run_id, "name": config.name, "project": self._track.project, "entity": self._track.entity,
            "mode": self._track.mode, "server": _server(self._track), "folder": os.path.abspath(self._track.folder),
            "config": run_settings(config),
        }  # fmt: skip
        self._ask("open", **about)

    def send(self, items: list[Item]) -> None:
        """Store each of these records once."""
        self._ask("send", records=[_record(item) for item in items])
        if items[-1].is_event:
            self._exit_code = int(alert_level(items[-1].record) == "error")

    def stored(self) -> tuple[int, None]:
        """Return how many records of this run are stored; their events are stored with them."""
        return self._ask("stored")["stored"], None

    def close(self) -> None:
        """Mark the run as finished, or as failed after a failure, and end the process."""
        try:
            self._ask("close", exit_code=self._exit_code)
        finally:
            self._end()

    def _ask(self, request: str, **arguments: Any) -> dict:
        """Send a request to the process and return its answer; the process ends if it fails."""
        assert self._process.stdin and self._process.stdout, "both are pipes"
        try:
            self._process.stdin.write(json.dumps([request, arguments]) + "\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], SECONDS[request])
            line = self._process.stdout.readline() if ready else ""
            answer = json.loads(line) if line else {"problem": f"no answer within {SECONDS[request]:g} seconds"}
            if ready and not line:
                answer = {"problem": "its client has ended"}
        except OSError:
            answer = {"problem": "its client has ended"}
        if problem := answer.get("problem"):
            self._end()
            raise _explained(self._track, problem)
        return answer

    def _end(self) -> None:
        """End the process, however far it is."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _record(item: Item) -> dict:
    """Return a record as the sender takes it: a row of history, and its alert or its table and picture."""
    record, row = item.record, {"step": item.step}
    found: dict[str, Any] = {"number": item.number, "time": record["time"]}
    if item.is_event:
        name, values = event_values(record)
        level = {"info": "INFO", "warn": "WARN", "error": "ERROR"}[alert_level(record)]
        found["alert"] = {"title": record["event"], "text": as_text(record), "level": level}
        return found | {"row": row | {"event": record["event"], name: values}}
    if "models" in record:
        found["table"] = {"name": TABLE, "html": _html(record["models"])}
        if png := draw_side_by_side(record["models"]):
            found["picture"] = {"name": PICTURE, "png": base64.b64encode(png).decode()}
    return found | {"row": row | record["metrics"]}


def _html(rows: list[dict]) -> str:
    """Return the table of all models; a table of the client would be an artifact with versions of its own."""
    columns, cells = models_table(rows)
    lines = ["".join(f"<td>{escape('' if cell is None else str(cell))}</td>" for cell in row) for row in cells]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    return f"<table border='1'>{''.join(f'<tr>{line}</tr>' for line in (head, *lines))}</table>"


def _explained(track: WandbSettings, problem: str) -> TrackError:
    """Return the error of a tracker in one line."""
    server = _server(track)
    if re.search(r"\b(401|403)\b|not logged in|API key|PERMISSION", problem):
        return TrackError(f"{LABEL} at {server}: refuses the key. {_LOG_IN}")
    if any(word in problem for word in ("did not respond", "connection refused", "timed out", "unreachable")):
        problem = f"no answer ({problem})"
    return TrackError(f"{LABEL} at {server if track.mode == 'online' else track.folder}: {problem[:160]}")


def _server(track: WandbSettings) -> str:
    return (track.server or SERVICE).rstrip("/")


def _has_login(track: WandbSettings) -> bool:
    """Return True if the environment or the file of logins has a key for the server."""
    if any(os.environ.get(name) for name in (*SECRETS, "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(_server(track)).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False
