"""Transfer of the spool to a tracker: every record once and in order, without delaying the run.

The id of a record follows from the spool alone, and a tracker stores each id once. After an outage or a kill,
records that may not have arrived are therefore sent again, and no state has to be kept.
A thread does the sending, because a tracker may be slow or never answer.
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
CLOSE_SECONDS = 10.0  # seconds that the end of a run waits for a tracker


@dataclass(frozen=True)
class Item:
    """A record of the spool, ready to be sent.

    Attributes:
        id: 32 hex digits, unique to this record and the same whenever it is sent.
        number: place of the record in the spool, from 0.
        step: the training step of the record; for an event, the last one before it.
    """

    id: str
    number: int
    record: dict
    step: int

    @property
    def is_event(self) -> bool:
        """Return True if this is an event, and not metrics of training."""
        return "event" in self.record


class Connection(Protocol):
    """An open tracker of one run. After any exception the forwarder tries again later."""

    def send(self, items: list[Item]) -> None:
        """Store each of these records once, however often it is sent, before this returns."""

    def stored(self) -> Stored:
        """Return how many records of this run are stored."""

    def close(self) -> None:
        """End the connection after the last record. The next call of the opener begins another one."""


# How many records of a run are stored, and how many events; None if that is unknown, or if no event is apart from its
# record.
Stored = tuple[int, int | None] | None
# (id of the spool, time of its first record in seconds since the epoch) -> the tracker
Opener = Callable[[str, float], Connection]


class Spool:
    """A reader of `events.jsonl` that goes on at the place it has reached. A new file is another spool."""

    def __init__(self, path: Path):
        self._path, self._offset, self._step = path, 0, 0
        self.id, self.began = "", 0.0
        self.records = self.events = 0  # read so far

    def read(self) -> list[Item]:
        """Return the records that were written since the last call."""
        records, self._offset = read_events(self._path, self._offset)
        return [self._number(record) for record in records]

    def _number(self, record: dict) -> Item:
        content = json.dumps(record, sort_keys=True)
        if not self.id:
            self.id, self.began = _digest(content), float(record.get("time", 0))
        self._step = record["step"] if "metrics" in record else self._step
        item = Item(_digest(f"{self.id} {self.records} {content}"), self.records, record, self._step)
        self.records += 1
        self.events += item.is_event
        return item


class Forwarder:
    """The sender of a growing spool to a tracker.

    Args:
        spool: the workspace's `events.jsonl`.
        open_tracker: connects; called again after every failure.
        close_seconds: the longest time that `close` waits.

    Attributes:
        problem: why the last attempt failed; None if it did not.
    """

    def __init__(self, spool: Path, open_tracker: Opener, close_seconds: float = CLOSE_SECONDS):
        self._path, self._open, self._close_seconds = spool, open_tracker, close_seconds
        self._spool = Spool(spool)
        self._tracker: Connection | None = None
        self._waiting: list[Item] = []
        self._news, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.problem: str | None = None

    def forward(self) -> threading.Thread:
        """Wake the thread that sends new records, and return it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="forwarder", daemon=True)
            self._thread.start()
        self._news.set()
        return self._thread

    def close(self) -> None:
        """Send the rest within `close_seconds`; `problem` says why records remained."""
        self._closing.set()
        thread = self.forward()
        thread.join(self._close_seconds)
        if thread.is_alive():
            self.problem = self.problem or f"no answer within {self._close_seconds:g} seconds"

    def send_all(self) -> int:
        """Send all missing records in this thread, check that they are stored, and close the connection.

        Returns:
            How many records were sent.

        Raises:
            TrackError: if the tracker does not store the records.
            Exception: any other error of the tracker.
        """
        sent = self._send_new()
        if not self._is_stored():
            self._reopen(skip_stored=False)
            sent += self._send_waiting()
            if not self._is_stored():
                raise TrackError("the tracker did not store the records")
        if self._tracker:
            self._tracker.close()
            self._tracker = None
        return sent

    def _work(self) -> None:
        pause = FIRST_RETRY
        while True:
            last = self._closing.is_set()
            try:
                self.send_all() if last else self._send_new()
                self.problem, pause = None, FIRST_RETRY
            except Exception as error:  # the run goes on after any error of a tracker
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
            self._reopen()
        else:
            self._waiting += self._spool.read()
        return self._send_waiting()

    def _send_waiting(self) -> int:
        sent = 0
        while self._waiting:
            batch = self._waiting[:BATCH]
            assert self._tracker is not None, "records wait only after the tracker was opened"
            self._tracker.send(batch)
            del self._waiting[:BATCH]
            sent += len(batch)
        return sent

    def _reopen(self, skip_stored: bool = True) -> None:
        """Open the tracker, and read the spool from its beginning; leave out stored records if `skip_stored`."""
        self._spool = Spool(self._path)
        items = self._spool.read()
        if not items:
            return
        self._tracker = tracker = self._open(self._spool.id, self._spool.began)
        self._waiting = items[_stored_first(items, tracker.stored()) if skip_stored else 0 :]

    def _is_stored(self) -> bool:
        if self._tracker is None:
            return True  # there was nothing to send
        stored = self._tracker.stored()
        if stored is None:
            return True
        records, events = stored
        return records >= self._spool.records and (events is None or events >= self._spool.events)


def _stored_first(items: list[Item], stored: Stored) -> int:
    """Return how many of the first items are stored; 0 if the tracker's two counts fit no such number."""
    if stored is None:
        return 0
    records, events = stored
    fits = records <= len(items) and events in (None, sum(item.is_event for item in items[:records]))
    return records if fits else 0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
