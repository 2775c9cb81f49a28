"""A tracker in one file: it writes records to a file."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.track import TRACK_SECTIONS, Track
from pipeline.errors import TrackError
from pipeline.tracking.trackers import TRACKERS


class DiarySettings(Track):
    """The settings of a diary."""

    file: str


LABEL, REQUIRES, SECRETS = "Diary", (), ()


def register() -> None:
    """Add the tracker `diary`."""
    TRACK_SECTIONS["diary"] = DiarySettings
    TRACKERS["diary"] = __name__


def check(track):
    """Refuse a name that is not that of a diary."""
    if not track.file.endswith(".jsonl"):
        raise TrackError(f"track.file {track.file}: not a diary. Try: a name that ends in .jsonl")


def connect(config, run_id, began):
    """Return the diary of a run."""
    return Diary(Path(config.track.file))


def dashboard(config):
    """Return the command that shows the diary."""
    return f"cat {config.track.file}"


def place(track):
    """Return the name of the diary."""
    return track.file


def state():
    """Return what there is of it on this machine."""
    return {"folder": "anywhere"}


class Diary:
    """A file with one line for each record."""

    def __init__(self, path):
        self.path = path

    def send(self, items):
        with open(self.path, "a") as file:
            file.writelines(json.dumps({"id": item.id, **item.record}) + "\n" for item in items)

    def stored(self):
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        return len(lines), sum('"event"' in line for line in lines)

    def close(self):
        self.path = None
