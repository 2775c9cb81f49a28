"""A watch on this process: what it writes, starts and unpickles, and whether it opens a private file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKEN = "hf_pastedByMistakeWhereItDoesNotBelong42"
HUB_TOKEN = "hf_theOneInTheEnvironmentOfTheseTests99"
WRITE_TOKEN = "trackioWritesWithThis-0123456789"
PASSWORD = "PASSWORD=correct-horse-battery"
SECRETS = (TOKEN, HUB_TOKEN, WRITE_TOKEN)
BAIT = "private.env"  # a file with the password, which nobody is to open

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.truncate": 1}
_NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
_watchers: list[Watch] = []


class Watch:
    """What was done while it was open that is not to be done for a file from anywhere.

    Python's own audit events tell of it, whichever library is the one to do it.
    """

    def __init__(self, allowed: Path):
        self._allowed = str(allowed.resolve())
        self.seen: list[str] = []

    def note(self, event: str, arguments: tuple) -> None:
        if event in _NEVER:
            self.seen.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            self._note_write(event, arguments[0])
        elif event == "open" and str(arguments[0]).endswith(BAIT):
            self.seen.append(f"{event} {arguments[0]}")
        elif event in _PATHS:
            for path in arguments[: _PATHS[event]]:
                self._note_write(event, path)

    def _note_write(self, event: str, path: object) -> None:
        if isinstance(path, (str, bytes)):
            real = os.path.realpath(os.fsdecode(path))
            own = (
                real.startswith((self._allowed, "/dev/null", "/proc/self"))
                or real.endswith(".pyc")
                or "__pycache__" in real
            )
            if not own:
                self.seen.append(f"{event} {real}")


def audit(event: str, arguments: tuple) -> None:
    if _watchers and (event in _PATHS or event in _NEVER or event == "open"):
        for watch in _watchers:
            watch.note(event, arguments)


@contextmanager
def watching(allowed: Path) -> Iterator[Watch]:
    """See that nothing is written outside `allowed` or unpickled, no process started, nobody called, no bait opened."""
    watch = Watch(allowed)
    _watchers.append(watch)
    try:
        yield watch
    finally:
        _watchers.remove(watch)
