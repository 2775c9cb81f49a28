"""Trackio: events as metrics to plot and as alerts to read, in one run with the training's curves.

`quantization_completed` for int8 becomes the metric `quantization/int8/completed = 1`
with its numbers beside it, and an alert whose title is the event's name and whose text
is the record as compact JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import numbers
import os
import shutil
import sys
import warnings

from pipeline.config import Config


class TrackioTracker:
    """Sends records to Trackio's local database. All calls come from one thread."""

    def __init__(self, config: Config):
        with _silence():
            import trackio

            # What its threads cannot write they warn about, over the run's lines; `flush` finds out.
            warnings.filterwarnings("ignore", message=".*[Tt]rackio.*")
            self._trackio, self._project = trackio, config.track.project
            self._sent: set[str] = set()
            self._run = trackio.init(
                project=config.track.project,
                name=config.name,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
                config={"model": config.model.source, "data": config.data.source, "method": config.train.method},
            )
            self._stored = self._read_back()

    def holds(self, record: dict) -> bool:
        """Is this event in the database?"""
        return _text(record) in self._stored

    def send(self, record: dict) -> None:
        with _silence():
            if "metrics" in record:
                self._run.log({**record["metrics"], "train/global_step": record["step"]})
                return
            self._run.log(as_metrics(record))
            failed = record["event"].endswith("_failed")
            level = self._trackio.AlertLevel.ERROR if failed else self._trackio.AlertLevel.INFO
            self._run.alert(title=record["event"], text=_text(record), level=level)
            self._sent.add(_text(record))

    def flush(self) -> bool:
        """Finish the run; True if every event sent is in the database, for Trackio itself does not say."""
        with _silence():
            self._trackio.finish()
            return self._sent <= self._read_back()

    def _read_back(self) -> set[str]:
        """The events in the database, as the texts of their alerts."""
        try:
            return {alert["text"] for alert in self._trackio.Api().alerts(self._project)}
        except ValueError:  # the project has no database yet
            return set()


def _text(record: dict) -> str:
    return json.dumps(record, separators=(",", ":"))


def as_metrics(record: dict) -> dict[str, float]:
    """An event's name and numbers as metrics under `stage[/variant]/`."""
    prefix = "/".join(filter(None, (record["stage"], record.get("variant"))))
    metrics: dict[str, float] = {f"{prefix}/{record['event'].rpartition('_')[2]}": 1}
    for key, value in record.items():
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and key != "time":
            metrics[f"{prefix}/{key}"] = value
    return metrics


def dashboard_hint(config: Config) -> str:
    """The command that opens the dashboard, from here and with this environment."""
    folder = os.environ.get("TRACKIO_DIR")
    beside = os.path.relpath(os.path.join(os.path.dirname(sys.executable), "trackio"))
    program = "trackio" if shutil.which("trackio") else beside
    return f"{f'TRACKIO_DIR={folder} ' if folder else ''}{program} show --project {config.track.project}"


@contextlib.contextmanager
def _silence():
    """Trackio prints what it does; the terminal belongs to the run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
