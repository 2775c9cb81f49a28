"""Experiment trackers. A tracker is one module here, and one section in `pipeline.config.track`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast

from pipeline.config.schema import Config
from pipeline.config.track import Track
from pipeline.errors import MissingExtra
from pipeline.system.libraries import is_installed
from pipeline.tracking.forwarder import Connection, Forwarder, Opener

# The module of each tracker by the name that `track.tracker` has.
TRACKERS = {
    "trackio": "pipeline.tracking.trackers.trackio",
    "wandb": "pipeline.tracking.trackers.wandb",
    "mlflow": "pipeline.tracking.trackers.mlflow",
}


class Tracker(Protocol):
    """The module of a tracker."""

    LABEL: str  # its name for people
    REQUIRES: tuple[tuple[str, str], ...]  # (module, extra) of the optional packages that it needs
    SECRETS: tuple[str, ...]  # environment variables of its tokens, the usual one first

    def check(self, track: Track) -> None:
        """Raise if settings cannot work; a server that does not answer now gets the events later.

        It is called only if the packages are installed.

        Raises:
            TrackError: if a token is missing or may not write.
        """

    def connect(self, config: Config, run_id: str, began: float) -> Connection:
        """Connect to the tracker for one run.

        Args:
            run_id: identity of the run, 32 hex digits.
            began: seconds since the epoch.

        Raises:
            TrackError: if it does not answer.
        """

    def dashboard(self, config: Config) -> str:
        """Return the address of the dashboard, or the command that opens it."""

    def place(self, track: Track) -> str:
        """Return the name of the place that shows a run."""

    def state(self) -> dict:
        """Return the tracker's state on this machine, as plain data with a `folder`, without its packages."""


def tracker(name: str) -> Tracker:
    """Import and return the module of a tracker."""
    return cast(Tracker, importlib.import_module(TRACKERS[name]))


def check(track: Track) -> None:
    """Raise if the tracker of a run cannot work.

    Raises:
        MissingExtra: if a package is not installed.
        TrackError: if a token is missing or may not write, or settings cannot work.
    """
    _installed(track).check(track)


def opener(config: Config) -> Opener:
    """Return the function that connects a `Forwarder` to the tracker of a run, and imports the tracker only then."""
    return lambda run_id, began: _installed(config.track).connect(config, run_id, began)


def _installed(track: Track) -> Tracker:
    """Return the module of a tracker whose packages are installed."""
    found = tracker(track.tracker)
    for module, extra in found.REQUIRES:
        if not is_installed(module):
            raise MissingExtra(f"track.tracker {track.tracker}: {found.LABEL}", extra)
    return found


def sync(spool: Path, config: Config) -> int:
    """Send the records of a run's `events.jsonl` that the tracker does not have yet.

    Returns:
        The number of records that were sent.

    Raises:
        MissingExtra: if a package of the tracker is not installed.
        TrackError: if the tracker cannot be reached, or refuses.
    """
    return Forwarder(spool, opener(config)).send_all()
