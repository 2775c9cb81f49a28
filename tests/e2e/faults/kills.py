"""Kills of a run at chosen moments, followed by the same command again.

A moment lies between two events of a run that nobody disturbed: so long after the first of them. So the
moments fall into the same parts of the work on a quick machine and on a slow one.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import Place, processes_in

POLL_SECONDS = 0.005
ENDING_SECONDS = 60.0  # within which what a killed run had started has to be gone

Process = tuple[int, str]  # its id, and when it was started, for ids are used again


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the event `after`, which is the `number`-th of the undisturbed run; 0 is its start."""

    number: int
    after: str
    delay: float

    def __str__(self) -> str:
        return f"{self.after} + {self.delay:.2f} s"


@dataclass(frozen=True)
class Timeline:
    """The events of an undisturbed run, by name and variant, and the seconds at which they came; the first is 0."""

    names: tuple[str, ...]
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, place: Place, started: float, ended: float) -> Timeline:
        events = place.events()
        times = (started, *(event["time"] for event in events), ended)
        return cls(("start", *map(_name, events)), tuple(max(0.0, t - started) for t in times))

    def moments(self, count: int) -> list[Moment]:
        """`count` moments in order, spread half by time and half by events, so that short stages have theirs too."""
        lengths = [b - a for a, b in zip(self.seconds, self.seconds[1:], strict=False)]
        whole = sum(lengths)
        weights = [0.5 * length / whole + 0.5 / len(lengths) for length in lengths]
        found, number, before = [], 0, 0.0
        for i in range(count):
            at = (i + 0.5) / count
            while at > before + weights[number] and number < len(weights) - 1:
                before += weights[number]
                number += 1
            share = (at - before) / weights[number]
            found.append(Moment(number, self.names[number], share * lengths[number]))
        return found

    def reached(self, events: Sequence[dict]) -> int:
        """How far a run is that has sent these events since it was started: the number of the last of them.

        What is named several times, and done again after a kill, is taken for the next of that name.
        """
        at = 0
        for event in events:
            same = [number for number, name in enumerate(self.names) if name == _name(event)]
            at = min(same, key=lambda number: abs(number - at - 1), default=at)
        return at


def kill_at(place: Place, timeline: Timeline, moment: Moment) -> list[Process] | None:
    """Start the run, and kill the process that was started at a moment; None where it had ended before.

    What that had started is left to find out by itself, and returned.

    Raises:
        AssertionError: where the run ended in another way.
    """
    seen = len(place.events())
    with open(place.folder / "killed.log", "ab") as log:
        process = subprocess.Popen(
            place.command("run", place.config.name), cwd=place.folder, env=place.env, stdout=log, stderr=log
        )
    while process.poll() is None and moment.number > timeline.reached(place.events()[seen:]):
        time.sleep(POLL_SECONDS)
    end = time.monotonic() + moment.delay
    while process.poll() is None and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    children = [(pid, _birth(pid)) for pid in processes_in(place.folder) if pid != process.pid]
    process.kill()
    code = process.wait()
    if code != -signal.SIGKILL:
        assert code == 0, (place.folder / "killed.log").read_text(errors="replace")[-2000:]
        return None
    return children


def left(processes: Sequence[Process]) -> list[int]:
    """Which of these processes are still there after all the time that they may take to end."""
    end = time.monotonic() + ENDING_SECONDS
    while (alive := [pid for pid, birth in processes if _birth(pid) == birth]) and time.monotonic() < end:
        time.sleep(0.1)
    return alive


def _name(event: dict) -> str:
    return " ".join(filter(None, (event["event"], event.get("variant"))))


def _birth(pid: int) -> str:
    """When a process was started; nothing for one that has ended, waited for or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
