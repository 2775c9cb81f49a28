"""The peak memory of processes that run under another one, by a name that their command line gives. Linux only."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
POLL_SECONDS = 0.1


class Watch:
    """A watch over the processes under `root`: the peak resident bytes of each with its children, by its name.

    Args:
        root: id of a process.
        name_of: returns the name of a process from the words of its command line, or None to leave it out.
    """

    def __init__(self, root: int, name_of: Callable[[list[str]], str | None]):
        self.peaks: dict[str, int] = {}
        self._root, self._name_of, self._names, self._ended = root, name_of, {}, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.is_set():
            resident, children = _processes()
            for process in _tree(children, self._root):
                if name := self._name(process):
                    now = sum(resident.get(p, 0) for p in _tree(children, process))
                    self.peaks[name] = max(self.peaks.get(name, 0), now, _peak_alone(process))
            time.sleep(POLL_SECONDS)

    def _name(self, process: int) -> str | None:
        if process not in self._names:
            words = []
            with suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")[:-1]
            if (name := self._name_of(words)) is None:
                return None  # or not yet: a process is a copy of its parent at first
            self._names[process] = name
        return self._names[process]


def stage_of(words: list[str]) -> str | None:
    """Return the stage of `python -m pipeline.workflow.stages FOLDER STAGE [VARIANT ...]`.

    It is the variant's name if the stage measures one, as in a plan; None for another command.
    """
    if "pipeline.workflow.stages" not in words:
        return None
    stage, *variants = words[words.index("pipeline.workflow.stages") + 2 :]
    return variants[0] if stage == "measure_variant" else stage


def _processes() -> tuple[dict[int, int], dict[int, list[int]]]:
    """Return resident bytes of every process, and the children of every process."""
    resident: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        with suppress(OSError, IndexError, ValueError):
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            resident[int(entry)] = PAGE * int(Path(f"/proc/{entry}/statm").read_text().split()[1])
            children.setdefault(parent, []).append(int(entry))
    return resident, children


def _tree(children: dict[int, list[int]], root: int) -> Iterator[int]:
    yield root
    for child in children.get(root, ()):
        yield from _tree(children, child)


def _peak_alone(process: int) -> int:
    """Return the peak of one process, which no gap between two looks can hide."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0
