"""The process of one stage: `python -m pipeline.stages FOLDER STAGE PIPE [VARIANT ...]`.

Started by `pipeline.process` alone. Sends the stage's events, reports over the pipe,
and ends when its parent does: the parent holds the other end of standard input.
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

from pipeline.errors import UserError, redact
from pipeline.events import Events, one_line
from pipeline.libraries import quiet
from pipeline.stages import STEPS
from pipeline.workspace import Workspace

PROGRESS_SECONDS = 0.2


class Terminated(BaseException):
    """SIGTERM came, or the parent went away."""


def main() -> int:
    folder, stage, pipe, *variants = sys.argv[1:]
    step = STEPS[stage]
    report = _Pipe(int(pipe))
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    workspace = Workspace.open(folder)
    config = workspace.config()
    events = Events(workspace.events_path, config.name, report.progress, report.show)
    about = tuple(variants) if step.verb == "quantize" else (None,)
    start = time.monotonic()
    try:
        quiet()
        module = importlib.import_module(f"pipeline.stages.{stage}")
        if step.starts:
            for variant in about:
                events.emit(step.verb, "started", variant, **module.parameters(config, variant))
        outcome = module.run(config, workspace, events, tuple(variants))
        if step.completes:
            seconds = round(time.monotonic() - start, 3)
            for variant in about:
                events.emit(step.verb, "completed", variant, **{"seconds": seconds, **_plain(outcome.summary)})
        report.send({"outcome": {"outputs": [str(p) for p in outcome.outputs], "summary": outcome.summary}})
        return 0
    except BaseException as error:
        if step.verb is not None:
            for variant in about:
                events.failed(step.verb, variant, error, time.monotonic() - start)
        code = error.exit_code if isinstance(error, UserError) else 1
        if not isinstance(error, UserError):
            print(redact(traceback.format_exc()), file=sys.stderr)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        what = " ".join((step.verb or stage, *variants))
        report.send({"error": {"message": f"{what}: {kind}{one_line(error)}", "exit_code": code}})
        return code


def _plain(summary: dict) -> dict:
    """The part of a summary that belongs in an event: numbers and short texts, not tables."""
    return {k: v for k, v in summary.items() if isinstance(v, (int, float, str, bool))}


def _terminate(number, frame) -> None:
    raise Terminated("asked to end by SIGTERM")


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # returns when the parent is gone, or has closed its end
    os.kill(os.getpid(), signal.SIGTERM)


class _Pipe:
    """The way back to the parent. Progress is thinned out; what cannot be written is not missed."""

    def __init__(self, descriptor: int):
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)
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
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for threads that libraries left behind
