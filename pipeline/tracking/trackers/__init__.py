"""Places where events are shown."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import Config
from pipeline.tracking.forwarder import Forwarder, Opener, Tracker


def opener(config: Config) -> Opener:
    """What a `Forwarder` opens the run's tracker with. Trackio is imported only then."""

    def open_tracker(run_id: str, began: float) -> Tracker:
        from pipeline.tracking.trackers.trackio import TrackioTracker, place_of

        return TrackioTracker(config, place_of(config.track), run_id, began)

    return open_tracker


def sync(spool: Path, config: Config) -> int:
    """Send the records of a run's `events.jsonl` that the tracker does not have yet.

    Returns:
        How many records were sent; 0 where the tracker has them all.

    Raises:
        TrackError: where it cannot be reached, or refuses.
    """
    return Forwarder(spool, opener(config)).send_all()
