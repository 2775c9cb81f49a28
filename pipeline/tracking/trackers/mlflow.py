"""MLflow: metrics as curves, settings as parameters, and each event as a tag of one run.

A run is found again by the tag `tunepress.spool`, which holds the id of its spool. An event is the tag
`event.NUMBER.NAME`; its value says the run, the variant and the outcome, and in the next line the record as compact
JSON. The figures of all models are one table and one picture among the artifacts.

MLflow's databases store an equal point of a curve once, but its interface does not promise that. So a connection to an
existing run reads the points of a curve before it adds to it. Tags and artifacts replace themselves. The tag
`tunepress.records` is written after the points of the records that it counts.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.schema import Config
from pipeline.config.track import MlflowSettings
from pipeline.errors import TrackError, redact
from pipeline.evaluation.overview import draw_side_by_side
from pipeline.tracking.events import alert_level
from pipeline.tracking.forwarder import Item
from pipeline.tracking.trackers.contents import as_text, models_table, run_settings

if TYPE_CHECKING:
    from mlflow.entities import Metric

LABEL = "MLflow"
REQUIRES = (("mlflow", "mlflow"), ("sqlalchemy", "mlflow"), ("alembic", "mlflow"))
SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
SPOOL, RECORDS, EVENT = "tunepress.spool", "tunepress.records", "event."  # tags; the last is a prefix
TABLE, PICTURE = "models.csv", "perplexity_against_size.png"
MOST_METRICS, MOST_EVENTS = 1000, 90  # of one request; MLflow takes 1000 metrics and 100 tags
LONGEST_TAG = 5000
ORDER = ["attributes.start_time ASC", "attributes.run_id ASC"]  # so that the oldest of equal runs is chosen
DATABASE = "sqlite:///"
# Its own client would try again for minutes, while the forwarder tries again anyway.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}


def check(track: MlflowSettings) -> None:
    """Raise if settings cannot work. A server that does not answer now gets the events later.

    Raises:
        TrackError: if the folder of the database does not exist.
    """
    folder = _database(track).parent if _is_local(track) else Path()
    if not folder.is_dir():
        raise TrackError(f"track.uri {track.uri}: no such folder ({folder}). Try: mkdir -p {folder}")


def connect(config: Config, run_id: str, began: float) -> MlflowTracker:
    """Return an open tracker of one run."""
    return MlflowTracker(config, run_id, began)


def dashboard(config: Config) -> str:
    """Return the address of the server, or the command that shows the database."""
    track = cast(MlflowSettings, config.track)
    return f"mlflow ui --backend-store-uri {track.uri}" if _is_local(track) else track.uri


def place(track: MlflowSettings) -> str:
    """Return the name of the place that shows a run."""
    return str(_database(track)) if _is_local(track) else track.uri


def state() -> dict:
    """Return the default database on this machine, and whether a login is set."""
    folder = str(_database(MlflowSettings(tracker="mlflow")).absolute())
    return {"folder": folder, "login_set": any(os.environ.get(name) for name in SECRETS)}


class MlflowTracker:
    """One run of one MLflow experiment, which has the name of the project.

    Args:
        run_id: id of the run, 32 hex digits.
        began: start of the run, in seconds since the epoch.

    Raises:
        TrackError: if the server does not answer, or refuses.
    """

    def __init__(self, config: Config, run_id: str, began: float):
        self._track = cast(MlflowSettings, config.track)
        self._uri = self._track.uri
        check(self._track)
        self._client = self._call(_client, self._uri)
        self._run, self._is_new = self._call(self._find, config, run_id, began)
        self._ended = self._run.info.status != "RUNNING"
        self._points: dict[str, set[tuple]] = {}
        self._last: Item | None = None

    def send(self, items: list[Item]) -> None:
        """Store each of these records once."""
        run_id = self._run.info.run_id
        if self._ended:
            self._call(self._client.update_run, run_id, "RUNNING")
            self._ended = False
        for part in _parts(items):
            self._call(self._store, run_id, part)
        self._last = items[-1]

    def stored(self) -> tuple[int, int]:
        """Return how many records of this run are stored, and how many of them are events."""
        tags = self._call(self._client.get_run, self._run.info.run_id).data.tags
        return int(tags.get(RECORDS, 0)), sum(name.startswith(EVENT) for name in tags)

    def close(self) -> None:
        """Mark the run as finished, or as failed after a failure."""
        if self._last and not self._ended:
            level = alert_level(self._last.record) if self._last.is_event else "info"
            status = {"info": "FINISHED", "warn": "KILLED", "error": "FAILED"}[level]
            ended = _milliseconds(self._last.record)
            self._call(self._client.set_terminated, self._run.info.run_id, status, ended)

    def _find(self, config: Config, run_id: str, began: float) -> tuple[Any, bool]:
        """Return the run with the id of the spool, and whether it is new."""
        from mlflow.entities import Param

        project, name = config.track.project, config.name
        experiment = self._client.get_experiment_by_name(project)
        place = (_database(self._track).parent / "mlruns").absolute().as_uri() if _is_local(self._track) else None
        identity = experiment.experiment_id if experiment else self._client.create_experiment(project, place)
        found = self._client.search_runs([identity], f"tags.`{SPOOL}` = '{run_id}'", order_by=ORDER)
        if found:
            return found[0], False
        run = self._client.create_run(identity, int(began * 1000), {SPOOL: run_id}, run_name=name)
        settings = [Param(key, value[:500]) for key, value in run_settings(config).items()]
        self._client.log_batch(run.info.run_id, params=settings)
        return run, True

    def _store(self, run_id: str, items: list[Item]) -> None:
        from mlflow.entities import RunTag

        points = [point for item in items for point in _points(item) if not self._is_stored(run_id, point)]
        events = [RunTag(_event_name(item), as_text(item.record)[:LONGEST_TAG]) for item in items if item.is_event]
        for item in items:
            if "models" in item.record:
                self._store_models(run_id, item.record["models"])
        self._client.log_batch(run_id, metrics=points)
        self._client.log_batch(run_id, tags=[*events, RunTag(RECORDS, str(items[-1].number + 1))])

    def _is_stored(self, run_id: str, point: Metric) -> bool:
        if self._is_new:
            return False
        if point.key not in self._points:
            known = self._client.get_metric_history(run_id, point.key)
            self._points[point.key] = {(each.step, each.timestamp, _text(each.value)) for each in known}
        return (point.step, point.timestamp, _text(point.value)) in self._points[point.key]

    def _store_models(self, run_id: str, rows: list[dict]) -> None:
        """Store the table and the picture of all models; sent again, they replace themselves."""
        columns, cells = models_table(rows)
        table = io.StringIO(newline="")
        csv.writer(table, lineterminator="\n").writerows([columns, *cells])
        contents = {TABLE: table.getvalue().encode(), PICTURE: draw_side_by_side(rows)}
        with tempfile.TemporaryDirectory() as folder:
            for name, content in contents.items():
                if content:
                    Path(folder, name).write_bytes(content)
                    self._client.log_artifact(run_id, str(Path(folder, name)))

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call a function of MLflow's client; its errors are errors of the tracker."""
        try:
            return function(*arguments)
        except Exception as error:  # its client passes on errors of databases and of HTTP libraries
            raise _explained(self._uri, error) from None


def _client(uri: str) -> Any:
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _explained(uri: str, error: Exception) -> TrackError:
    """Return the error of a tracker in one line."""
    text = redact(" ".join(str(error).split()) or type(error).__name__)[:300]
    if re.search(r"\b(401|403)\b|UNAUTHENTICATED|PERMISSION_DENIED", text):
        return TrackError(f"track.uri {uri}: the server refuses the login. Try: export MLFLOW_TRACKING_TOKEN=TOKEN")
    if "Max retries exceeded" in text or "Connection" in type(error).__name__ or "timed out" in text:
        return TrackError(f"track.uri {uri}: no answer ({text})")
    return TrackError(f"track.uri {uri}: {text}")


def _parts(items: list[Item]) -> Iterator[list[Item]]:
    """Yield the items in parts that fit into one request each."""
    part: list[Item] = []
    metrics = events = 0
    for item in items:
        more = len(item.record.get("metrics", ()))
        if part and (metrics + more > MOST_METRICS or events + item.is_event > MOST_EVENTS):
            yield part
            part, metrics, events = [], 0, 0
        part.append(item)
        metrics, events = metrics + more, events + item.is_event
    yield part


def _points(item: Item) -> list[Metric]:
    """Return the metrics of a record, with names that MLflow takes."""
    from mlflow.entities import Metric

    moment = _milliseconds(item.record)
    figures = item.record.get("metrics", {})
    return [Metric(re.sub(r"[^\w. /-]", "_", key), float(value), moment, item.step) for key, value in figures.items()]


def _event_name(item: Item) -> str:
    return f"{EVENT}{item.number:05d}.{item.record['event']}"


def _text(value: float) -> str:
    """Return a value as MLflow's databases keep it: infinity is their largest number."""
    return "nan" if math.isnan(value) else repr(max(-sys.float_info.max, min(value, sys.float_info.max)))


def _milliseconds(record: dict) -> int:
    return round(record["time"] * 1000)


def _is_local(track: MlflowSettings) -> bool:
    return track.uri.startswith(DATABASE)


def _database(track: MlflowSettings) -> Path:
    return Path(track.uri.removeprefix(DATABASE))
