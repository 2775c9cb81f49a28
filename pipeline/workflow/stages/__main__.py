"""The process of one stage: `python -m pipeline.workflow.stages FOLDER STAGE [VARIANT ...]`.

Started by `pipeline.workflow.stage_process`, by itself or several at once through `accelerate launch`. Sends the
stage's events, reports over standard input, which is a socket, and ends when its parent does: the
parent holds the other end. Of several, the first alone sends events; what fails in any of them is
reported, and the parent sends the failure event.
"""

from __future__ import annotations

import contextlib
import importlib
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
from pipeline.tracking.events import Events, Unheard, one_line
from pipeline.training.distributed import Team, is_echo
from pipeline.workflow.stage_log import print_without_tokens, wait_for
from pipeline.workflow.stages import STEPS
from pipeline.workflow.workspace import Workspace

PROGRESS_SECONDS = 0.2
_held: list[object] = []
GRACE_SECONDS = 20.0  # as long as `pipeline.workflow.stage_process` gives a stage that it asks to end


class Terminated(BaseException):
    """SIGTERM came, or the parent went away."""


def main() -> int:
    folder, stage, *variants = sys.argv[1:]
    step, team = STEPS[stage], Team.here()
    workspace = Workspace.open(folder)
    writer = _print_to(None if team.leads else workspace.log_of(stage, variants, team.rank))
    report = _Socket()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    orphaned = threading.Event()
    threading.Thread(target=_end_with_parent, args=(orphaned,), daemon=True).start()
    config = workspace.config()
    shown = (report.progress, report.show) if team.hosts else ()
    events = (Events if team.leads else Unheard)(workspace.events_path, config.name, *shown)
    show_waits(events.show)
    about = tuple(variants) if step.verb == "quantize" else (None,)
    start = time.monotonic()
    try:
        if team.hosts:
            _wait_for_former(workspace)
        quiet()
        module = importlib.import_module(f"pipeline.workflow.stages.{stage}")
        if step.starts:
            for variant in about:
                events.emit(step.verb, "started", variant, **module.parameters(config, variant))
        outcome = module.run(config, workspace, events, tuple(variants))
        seconds = round(time.monotonic() - start, 3)
        for variant in about if step.completes else ():
            if outcome.refusal:
                events.failed(step.verb, variant, outcome.refusal, seconds)
            else:
                events.emit(step.verb, "completed", variant, **{"seconds": seconds, **_plain(outcome.summary)})
        if team.hosts:
            report.send({"outcome": {"outputs": [str(p) for p in outcome.outputs], "summary": outcome.summary}})
        report.send({"finished": team.rank})
        return 0
    except BaseException as problem:
        error = no_room(problem, workspace.folder) or problem
        if step.verb is not None and (team.size == 1 or orphaned.is_set()):
            for variant in about:
                with contextlib.suppress(OSError):  # where the disk is full, the line below has to do
                    events.failed(step.verb, variant, error, time.monotonic() - start)
        code = error.exit_code if isinstance(error, UserError) else 1
        if not isinstance(error, UserError):
            traceback.print_exc()
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        where = f"process {team.rank} of {team.size}: " if kind and team.rank else ""
        what = " ".join((step.verb or stage, *variants))
        told = {
            "type": type(error).__name__,
            "message": f"{where}{one_line(error)}",
            "told": f"{what}: {where}{kind}{one_line(error)}",
            "exit_code": code,
            "rank": team.rank,
            "echo": is_echo(error),
        }
        report.send({"error": told})
        return code
    finally:
        wait_for(writer)


def _plain(summary: dict) -> dict:
    """The part of a summary that belongs in an event: numbers and short texts, not tables."""
    return {k: v for k, v in summary.items() if isinstance(v, (int, float, str, bool))}


def _wait_for_former(workspace: Workspace) -> None:
    """Let the stage end whose run was killed; it may still be about to take away what it had half done.

    Raises:
        WorkspaceError: where it does not.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(workspace.folder / "stage.lock")
    try:
        lock.acquire(timeout=2 * GRACE_SECONDS)
    except Timeout:
        raise WorkspaceError(f"{workspace.folder}: a stage of an earlier run is still ending; wait for it") from None
    _held.append(lock)  # as long as this process lives


def _terminate(number, frame) -> None:
    raise Terminated("asked to end by SIGTERM")


def _end_with_parent(orphaned: threading.Event) -> None:
    sys.stdin.buffer.read()  # returns when the parent is gone, or has closed its end
    orphaned.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)  # it waits inside a library, for another process that has gone too


def _print_to(path: Path | None) -> int:
    """Everything that this process prints goes to a file of its own, or where it went; the process that writes it."""
    with open(path, "wb") if path else open(os.dup(1), "wb") as log:
        return print_without_tokens(log.fileno())


class _Socket:
    """The way back to the parent. Progress is thinned out; what cannot be written is not missed."""

    def __init__(self):
        self._file = os.fdopen(os.dup(sys.stdin.fileno()), "w", encoding="utf-8", buffering=1)
        self._last = 0.0
        self._lock = threading.Lock()  # a download tells of its progress in a thread of its own

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
