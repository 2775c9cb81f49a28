"""From the spool to a tracker: every record once and in order, and never in the run's way.

`events.jsonl` is the truth. A record's identity follows from the spool alone, and a tracker
keeps a record that it is sent twice only once; so what is not known to have arrived is sent
again, after an outage and after a kill alike, and nothing about it has to be remembered.
All of it happens in a thread, for a tracker may be slow, or at an address that never answers.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import TrackError
from pipeline.tracking.events import one_line, read_events

BATCH = 200  # records in one request
FIRST_RETRY, LAST_RETRY = 0.5, 30.0  # seconds between attempts on a tracker that is away
PATIENCE = 10.0  # seconds that the end of a run waits for a tracker


@dataclass(frozen=True)
class Item:
    """A record of the spool on its way.

    id: 32 hex digits, the same whenever this record is sent and no other's.
    step: the training step it belongs to; for an event, the last one before it.
    """

    id: str
    record: dict
    step: int

    @property
    def is_event(self) -> bool:
        return "event" in self.record


class Connection(Protocol):
    """An open tracker of one run. Any exception means: not now, try again later."""

    def send(self, items: list[Item]) -> None:
        """Store these, once each, however often they are sent; they are stored when it returns."""

    def stored(self) -> tuple[int, int] | None:
        """How many records, and how many of them events, it holds of this run; None if it cannot know."""


# The spool's identity, and the time of its first record in seconds since the epoch -> the tracker
Opener = Callable[[str, float], Connection]


class Spool:
    """Reads `events.jsonl` on from where it had got to. A spool that begins anew is another spool."""

    def __init__(self, path: Path):
        self._path, self._offset, self._step = path, 0, 0
        self.id, self.began = "", 0.0
        self.records = self.events = 0  # read so far

    def read(self) -> list[Item]:
        """What has been written since."""
        records, self._offset = read_events(self._path, self._offset)
        return [self._number(record) for record in records]

    def _number(self, record: dict) -> Item:
        content = json.dumps(record, sort_keys=True)
        if not self.id:
            self.id, self.began = _digest(content), float(record.get("time", 0))
        self._step = record["step"] if "metrics" in record else self._step
        item = Item(_digest(f"{self.id} {self.records} {content}"), record, self._step)
        self.records += 1
        self.events += item.is_event
        return item


class Forwarder:
    """Sends a spool to a tracker while it grows.

    Args:
        spool: the workspace's `events.jsonl`.
        open_tracker: connects; called again after every failure.
        patience: seconds that `close` waits at most.
    """

    def __init__(self, spool: Path, open_tracker: Opener, patience: float = PATIENCE):
        self._path, self._open, self._patience = spool, open_tracker, patience
        self._spool = Spool(spool)
        self._tracker: Connection | None = None
        self._waiting: list[Item] = []
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.problem: str | None = None

    def forward(self) -> threading.Thread:
        """Say that there may be something new, and return the thread that sends it at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="forwarder", daemon=True)
            self._thread.start()
        self._news.set()
        return self._thread

    def close(self) -> None:
        """Send the rest, as far as the tracker's answers allow in bearable time; `problem` says what remained."""
        self._closing.set()
        thread = self.forward()
        thread.join(self._patience)
        if thread.is_alive():
            self.problem = self.problem or f"no answer within {self._patience:g} seconds"

    def send_all(self) -> int:
        """Send what is missing, here and now, and see that it arrived.

        Returns:
            How many records were sent.

        Raises:
            Exception: whatever the tracker raises; TrackError where it does not keep what it is sent.
        """
        sent = self._send_new()
        if not self._is_stored():
            self._begin_anew(known=False)
            sent += self._send_waiting()
            if not self._is_stored():
                raise TrackError("it did not keep what it was sent")
        return sent

    def _work(self) -> None:
        pause = FIRST_RETRY
        while True:
            last = self._closing.is_set()
            try:
                self.send_all() if last else self._send_new()
                self.problem, pause = None, FIRST_RETRY
            except Exception as error:  # whatever a tracker throws, the run goes on
                self.problem, self._tracker = one_line(error), None
            if last:
                return
            if self.problem:
                self._closing.wait(pause)
                pause = min(2 * pause, LAST_RETRY)
            else:
                self._news.wait()
            self._news.clear()

    def _send_new(self) -> int:
        if self._tracker is None:
            self._begin_anew()
        else:
            self._waiting += self._spool.read()
        return self._send_waiting()

    def _send_waiting(self) -> int:
        sent = 0
        while self._waiting:
            batch = self._waiting[:BATCH]
            assert self._tracker is not None, "what waits was read after it was opened"
            self._tracker.send(batch)
            del self._waiting[:BATCH]
            sent += len(batch)
        return sent

    def _begin_anew(self, known: bool = True) -> None:
        """Read the spool from its beginning; what a newly opened tracker says it holds is left out if `known`."""
        self._spool = Spool(self._path)
        items = self._spool.read()
        if not items:
            return
        self._tracker = tracker = self._open(self._spool.id, self._spool.began)
        held = _held(items, tracker.stored()) if known else 0
        self._waiting = items[held:]

    def _is_stored(self) -> bool:
        if self._tracker is None:
            return True  # there was nothing to send
        stored = self._tracker.stored()
        return stored is None or (stored[0] >= self._spool.records and stored[1] >= self._spool.events)


def _held(items: list[Item], stored: tuple[int, int] | None) -> int:
    """How many of the first items a tracker holds: as many as it says, if that many hold as many events; else none."""
    if stored is None:
        return 0
    records, events = stored
    fits = records <= len(items) and sum(item.is_event for item in items[:records]) == events
    return records if fits else 0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
