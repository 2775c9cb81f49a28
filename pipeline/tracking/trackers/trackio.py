"""Trackio: the curves of training, the models side by side, and events as alerts, all in one run.

A run's page opens on the losses, because Trackio shows names without a prefix first. Trackio draws a bar for each
number that a run has once, so numbers of events and totals stay together under one name, which it keeps and does not
draw: `quantization/NAME/completed` holds those of `quantization_completed` for a variant NAME. The figures of all
models are one table and one picture. An event is also an alert: its title is the name of the event, and its text says
the run, the variant and the outcome, and in the next line the record as compact JSON.

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
import math
import os
import shutil
import sys
from datetime import UTC, datetime
from typing import Any

from pipeline.config.schema import Config
from pipeline.config.track import TrackioSettings
from pipeline.evaluation.overview import draw_side_by_side
from pipeline.hub.retry import HubAway
from pipeline.tracking.events import alert_level
from pipeline.tracking.forwarder import Item
from pipeline.tracking.trackers.contents import as_text, event_values, models_table, run_settings
from pipeline.tracking.trackers.places import TOKEN_VARIABLE, Local, Picture, Place, Server, check_write_token
from pipeline.tracking.trackers.spaces import Space, find

LABEL = "Trackio"
REQUIRES: tuple[tuple[str, str], ...] = ()
SECRETS = (TOKEN_VARIABLE,)
TABLE, PICTURE = "models", "models/perplexity_against_size"  # their names in a run
_LOSSES = {"train/loss": "loss", "eval/loss": "held_out_loss"}
_TOTALS = ("/runtime", "_per_second", "/total_flos", "/mean_loss")  # numbers of training that a run has once


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
        self._config = run_settings(config) | {"_Created": _moment(began)}
        self._place = place
        place.open()

    def send(self, items: list[Item]) -> None:
        """Store each of these records once."""
        pictures: list[Picture] = []
        logs = [self._log(item, pictures) for item in items]
        logs[0]["config"] = self._config
        self._place.store(logs, [self._alert(item) for item in items if item.is_event], pictures)

    def stored(self) -> tuple[int, int] | None:
        """Return how many records of this run are stored, and how many of them are events; None if unknown."""
        return self._place.count(self._project, self._run_id)

    def close(self) -> None:
        """Close the connection to the place."""
        self._place.close()

    def _log(self, item: Item, pictures: list[Picture]) -> dict:
        """Return a record as a log, and add its picture to `pictures`."""
        metrics = as_metrics(item.record)
        if png := draw_side_by_side(item.record.get("models", ())):
            picture = Picture(self._project, self._about["run"], item.step, f"{item.id}.png", png)
            metrics[PICTURE] = picture.logged(f"{self._about['run']}: perplexity against size")
            pictures.append(picture)
        return self._entry(item) | {"metrics": metrics, "log_id": item.id}

    def _alert(self, item: Item) -> dict:
        title, text = item.record["event"], as_text(item.record)
        about = {"title": title, "text": text, "level": alert_level(item.record), "alert_id": item.id}
        return self._entry(item) | about

    def _entry(self, item: Item) -> dict:
        return self._about | {"step": item.step, "timestamp": _moment(item.record["time"])}


def as_metrics(record: dict) -> dict[str, Any]:
    """Return what a record adds to a run: figures to plot, a table, and what is only kept.

    NaN and infinity are strings, as in Trackio.
    """
    if "metrics" not in record:
        name, kept = event_values(record)
        return {name: {key: _plain(value) for key, value in kept.items()}}
    figures = {key: _plain(value) for key, value in record["metrics"].items()}
    totals = {key: figures.pop(key) for key in list(figures) if key.endswith(_TOTALS)}
    losses = {name: figures[key] for key, name in _LOSSES.items() if key in figures}
    tables = {TABLE: _table(record["models"])} if "models" in record else {}
    return losses | figures | ({"totals": totals} if totals else {}) | tables


def _table(rows: list[dict]) -> dict:
    """Return the figures of all models as a table of Trackio."""
    from trackio import Table

    columns, cells = models_table(rows)
    return {"_type": Table.TYPE, "_value": Table(columns=columns, data=cells).data}


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


def _plain(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
