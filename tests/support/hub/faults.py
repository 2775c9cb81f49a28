"""Faults on demand: a status instead of an answer, a dropped connection, a stall."""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" contains `pattern`."""

    pattern: str
    status: int | None = None
    reset: bool = False
    stall: float = 0.0
    times: int = 1
    after: bool = False
    cut: int | None = None
    first: Callable[[], object] | None = None
    headers: Mapping[str, str] | None = None


class Faults:
    """The faults that are still to strike."""

    def __init__(self):
        self._pending: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._pending.append(fault)

    @property
    def left(self) -> list[Fault]:
        """Those that have not struck as often as they should."""
        return [fault for fault in self._pending if fault.times > 0]

    def strike(self, method: str, path: str) -> Fault | None:
        """The fault for this request, if there is one; it is used up by asking."""
        with self._lock:
            for fault in self._pending:
                if fault.times > 0 and re.search(fault.pattern, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None
