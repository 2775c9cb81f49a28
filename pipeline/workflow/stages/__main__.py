"""Process of one stage: `python -m pipeline.workflow.stages FOLDER STAGE [VARIANT ...]`.

`pipeline.workflow.stage_process` starts it, alone or several at once through `accelerate launch`. It sends the
stage's events, and reports over standard input, which is a socket. It ends when its parent ends, because the
parent holds the other end of the socket. Of several processes, only the first sends events. Each reports its
failure, and the parent sends the failure event.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from pipeline.errors import UserError, WorkspaceError
from pipeline.hub.retry import show_waits
from pipeline.system.files import no_room
from pipeline.system.libraries import quiet
from pipeline.tracking.events import Events, SilentEvents
from pipeline.training.distributed import TrainingProcess, is_caused_by_other_process
from pipeline.workflow.stage_log import print_without_tokens, wait_for
from pipeline.workflow.stages import failure_of, perform, tell_failure
from pipeline.workflow.workspace import Workspace

PROGRESS_SECONDS = 0.2
_held: list[object] = []
GRACE_SECONDS = 20.0  # as long as `pipeline.workflow.stage_process` gives a stage that it asks to end


class Terminated(BaseException):
    """The end of a stage by SIGTERM, or because its parent has ended."""


def main() -> int:
    """Run the stage that the command line names, and return the exit code."""
    folder, stage, *names = sys.argv[1:]
    variants, process = tuple(names), TrainingProcess.current()
    log = None if process.is_main else Workspace(Path(folder)).log_of(stage, variants, process.rank)
    writer = _print_to(log)  # before anything can fail, since only this writer removes tokens
    workspace = Workspace.open(folder)
    report = _Socket()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    orphaned = threading.Event()
    threading.Thread(target=_end_with_parent, args=(orphaned,), daemon=True).start()
    config = workspace.config()
    shown = (report.progress, report.show) if process.is_local_main else ()
    events = (Events if process.is_main else SilentEvents)(workspace.events_path, config.name, *shown)
    show_waits(events.show)
    start = time.monotonic()
    try:
        if process.is_local_main:
            _wait_for_former(workspace)
        quiet()
        outcome = perform(stage, config, workspace, events, variants)
        if process.is_local_main:
            report.send({"outcome": {"outputs": [str(p) for p in outcome.outputs], "summary": outcome.summary}})
        report.send({"finished": process.rank})
        return 0
    except BaseException as problem:
        error = no_room(problem, workspace.folder) or problem
        if process.size == 1 or orphaned.is_set():
            with contextlib.suppress(OSError):  # on a full disk only the message to the parent is left
                tell_failure(stage, events, variants, error, time.monotonic() - start)
        if not isinstance(error, UserError):
            traceback.print_exc()
        failure = failure_of(stage, variants, error, process.rank, process.size)
        report.send({"error": {**failure, "echo": is_caused_by_other_process(error)}})
        return failure["exit_code"]
    finally:
        wait_for(writer)


def _wait_for_former(workspace: Workspace) -> None:
    """Wait for the stage of a killed run to end, because it may still be removing unfinished files.

    Raises:
        WorkspaceError: if it does not end.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(workspace.folder / "stage.lock")
    try:
        lock.acquire(timeout=2 * GRACE_SECONDS)
    except Timeout:
        raise WorkspaceError(f"{workspace.folder}: a stage of an earlier run is still ending. Try: again") from None
    _held.append(lock)  # until this process ends


def _terminate(number: int, frame: object) -> None:
    raise Terminated("ended by SIGTERM")


def _end_with_parent(orphaned: threading.Event) -> None:
    sys.stdin.buffer.read()  # returns when the parent has ended, or closed its end
    orphaned.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)  # the stage still waits inside a library, for another process that has ended


def _print_to(path: Path | None) -> int:
    """Send the output of this process to `path`, or to its present file; return the id of the writing process."""
    with open(path, "wb") if path else open(os.dup(1), "wb") as log:
        return print_without_tokens(log.fileno())


class _Socket:
    """The connection to the parent. Frequent progress is skipped; a message that cannot be written is dropped."""

    def __init__(self):
        self._file = os.fdopen(os.dup(sys.stdin.fileno()), "w", encoding="utf-8", buffering=1)
        self._last = 0.0
        self._lock = threading.Lock()  # a download reports its progress from another thread

    def send(self, message: dict) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._file.write(json.dumps(message, default=str) + "\n")

    def show(self, lines: list[str]) -> None:
        self.send({"show": lines})

    def progress(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS or done >= total:
            self._last = now
            self.send({"progress": [done, total, what]})


if __name__ == "__main__":
    os._exit(main())  # without waiting for threads that libraries left behind
