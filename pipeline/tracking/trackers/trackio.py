"""Trackio: events as metrics to plot and as alerts to read, in one run with the curves of training.

`quantization_completed` for a variant NAME becomes the metric `quantization/NAME/completed = 1`
with its numbers, and an alert. The alert's title is the name of the event, its text the record as compact JSON.

Trackio's own client queues in memory, forgets alerts that a server misses, and gives every
call a new random id. Here the ids follow from the spool. Trackio stores one row for each id,
in its database and behind its HTTP interface, so sending again is harmless.

A run has the name of its configuration and the id of its spool. With `--fresh` it is therefore
a second run of the same name, with its own curve and `_Created`.
Trackio gives metrics that come over HTTP the time of their arrival; their step keeps the order.
Variables of Trackio's own client (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL,
TRACKIO_WEBHOOK_URL) have no effect: the configuration names the place of a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from datetime import UTC, datetime

from pipeline.config.schema import Config
from pipeline.config.track import TrackioSettings
from pipeline.hub.retry import HubAway
from pipeline.tracking.events import alert_level
from pipeline.tracking.forwarder import Item
from pipeline.tracking.trackers.places import TOKEN_VARIABLE, Local, Place, Server, check_write_token
from pipeline.tracking.trackers.spaces import Space, find

LABEL = "Trackio"


def check(track: TrackioSettings) -> None:
    """Raise if settings cannot work. A place that does not answer now gets the events later.

    Raises:
        TrackError: if the token is missing or may not write, or the Space does not exist.
    """
    if track.server:
        check_write_token(track.server)
    if track.space:
        with contextlib.suppress(HubAway):
            find(track.space)


def connect(config: Config, run_id: str, began: float) -> TrackioTracker:
    """Return an open tracker of one run."""
    track = config.track
    if track.server:
        return TrackioTracker(config, Server(track.server), run_id, began)
    return TrackioTracker(config, Space(track.space) if track.space else Local(), run_id, began)


def place(track: TrackioSettings) -> str:
    """Return the name of the place that shows a run."""
    return track.space or track.server or "on this machine"


def state() -> dict:
    """Return the folder of Trackio's data on this machine, and whether a write token is set."""
    from huggingface_hub import constants

    folder = os.environ.get("TRACKIO_DIR") or os.path.join(constants.HF_HOME, "trackio")
    return {"folder": folder, "write_token_set": bool(os.environ.get(TOKEN_VARIABLE))}


class TrackioTracker:
    """One run of one Trackio project.

    Args:
        place: the place of the project.
        run_id: id of the run, 32 hex digits.
        began: start of the run, in seconds since the epoch.

    Raises:
        TrackError: if the place does not answer.
    """

    def __init__(self, config: Config, place: Place, run_id: str, began: float):
        self._project, self._run_id = config.track.project, run_id
        self._about = {"project": config.track.project, "run": config.name, "run_id": run_id}
        self._config = _settings(config) | {"_Created": _moment(began)}
        self._place = place
        place.open()

    def send(self, items: list[Item]) -> None:
        """Store each of these records once."""
        logs = [self._log(item) for item in items]
        logs[0]["config"] = self._config
        self._place.store(logs, [self._alert(item) for item in items if item.is_event])

    def stored(self) -> tuple[int, int] | None:
        """Return how many records of this run are stored, and how many of them are events; None if unknown."""
        return self._place.count(self._project, self._run_id)

    def _log(self, item: Item) -> dict:
        metrics = as_metrics(item.record)
        return self._entry(item) | {"metrics": metrics, "log_id": item.id}

    def _alert(self, item: Item) -> dict:
        title = item.record["event"]
        text = json.dumps(item.record, separators=(",", ":"))
        about = {"title": title, "text": text, "level": alert_level(item.record), "alert_id": item.id}
        return self._entry(item) | about

    def _entry(self, item: Item) -> dict:
        return self._about | {"step": item.step, "timestamp": _moment(item.record["time"])}


def as_metrics(record: dict) -> dict[str, float | str]:
    """Return a record's numbers: of training under their own names, of an event under `stage[/variant]/`.

    NaN and infinity are strings, as in Trackio.
    """
    if "metrics" in record:
        return {key: _plain_number(value) for key, value in record["metrics"].items()}
    prefix = "/".join(filter(None, (record["stage"], record.get("variant"))))
    metrics: dict[str, float | str] = {f"{prefix}/{record['event'].rpartition('_')[2]}": 1}
    for key, value in record.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "time":
            metrics[f"{prefix}/{key}"] = _plain_number(value)
    return metrics


def dashboard(config: Config) -> str:
    """Return the address of the dashboard, or the command that opens it with this environment."""
    track = config.track
    if track.server:
        return f"{track.server.rstrip('/')}/?project={track.project}"
    if track.space:
        return f"https://huggingface.co/spaces/{track.space}"
    folder = os.environ.get("TRACKIO_DIR")
    beside = os.path.relpath(os.path.join(os.path.dirname(sys.executable), "trackio"))
    program = "trackio" if shutil.which("trackio") else beside
    return f"{f'TRACKIO_DIR={folder} ' if folder else ''}{program} show --project {track.project}"


def _settings(config: Config) -> dict:
    """Return the settings that the dashboard's table of runs shows."""
    settings = {"model": config.model.source, "adapter": config.merge.adapter}
    if config.data:
        settings |= {"data": config.data.source, "method": config.train.method}
    return {key: value for key, value in settings.items() if value}


def _plain_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
