"""Eyes on this process: what it writes, starts and unpickles while a test gives it something hostile."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import UserError

TOKEN = "hf_pastedByMistakeWhereItDoesNotBelong42"
HUB_TOKEN = "hf_theOneInTheEnvironmentOfTheseTests99"
WRITE_TOKEN = "trackioWritesWithThis-0123456789"
SECRETS = (TOKEN, HUB_TOKEN, WRITE_TOKEN)

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


def _hook(event: str, arguments: tuple) -> None:
    if _watchers and (event in _PATHS or event in _NEVER or event == "open"):
        for watch in _watchers:
            watch.note(event, arguments)


@pytest.fixture(scope="session", autouse=True)
def _eyes():
    sys.addaudithook(_hook)  # there is no way to take one off; it sees nothing where nobody watches


@contextmanager
def watching(allowed: Path) -> Iterator[Watch]:
    """See that nothing is written outside `allowed`, no process started, nothing unpickled, nobody called."""
    watch = Watch(allowed)
    _watchers.append(watch)
    try:
        yield watch
    finally:
        _watchers.remove(watch)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to stand in, with tokens in the environment."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", WRITE_TOKEN)
    return folder


@pytest.fixture
def survives(place, capfd) -> Callable:
    """`survives(call)`: what comes back, or the line of the refusal; and that nothing else came of it."""

    def check(call: Callable[[], object]) -> str | None:
        with watching(place) as watch:
            try:
                call()
                told = None
            except UserError as error:
                told = str(error)
        assert watch.seen == []
        if told is not None:
            assert told.isprintable() and told.strip(), told
            assert len(told) < 4000, told
        out, err = capfd.readouterr()
        assert not any(secret in text for secret in SECRETS for text in (told or "", out, err))
        return told

    return check
