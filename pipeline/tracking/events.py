"""Stage events: appended to the spool of the run first, sent to a tracker from there.

A stage's process only appends to the spool, `events.jsonl`. The process that started the stage sends
the spool to the tracker (`pipeline.tracking.forwarder`). A record is one line of JSON: an event

    {"time": ..., "run": ..., "event": "merge_completed", "stage": "merge", ...}

or metrics, `{"time": ..., "run": ..., "metrics": {...}, "step": ...}`. At the end of a run such a record also has the
figures of all models side by side: `"models": [{"model": "int8", ...}, ...]`.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipeline.errors import UserError, printable, redact
from pipeline.system.files import sync

# verb -> (the stage's name in events, the name of its push event)
STAGES = {
    "train": ("training", "adapter_pushed"),
    "merge": ("merge", "merged_model_pushed"),
    "evaluate": ("evaluation", "evaluation_pushed"),
    "quantize": ("quantization", "quantized_model_pushed"),
    "publish": ("publish", "model_card_pushed"),
}
Kind = Literal["started", "completed", "pushed", "failed"]
# The `error` of a failure event whose stage was asked to end -> its message. Such a stage can go on.
STOPPED = {
    "KeyboardInterrupt": "stopped by the user",
    "Terminated": "stopped: the run was asked to end (SIGTERM), or its process has ended",
}


class Events:
    """The writer of a run's spool.

    Args:
        path: the workspace's `events.jsonl`.
        run: name of the run, in every record.
        on_progress: shows progress (done, total, activity) to people; nothing is stored.
        on_show: shows lines to people; nothing is stored.
    """

    def __init__(
        self,
        path: Path,
        run: str,
        on_progress: Callable[[int, int, str], None] | None = None,
        on_show: Callable[[list[str]], None] | None = None,
    ):
        self.path, self.run = path, run
        self._on_progress, self._on_show = on_progress, on_show

    def emit(self, verb: str, kind: Kind, variant: str | None = None, **fields: object) -> None:
        """Append an event of a stage to the spool, and flush it to the disk."""
        stage, pushed = STAGES[verb]
        event = pushed if kind == "pushed" else f"{stage}_{kind}"
        about = {"event": event, "stage": stage} | ({"variant": variant} if variant else {})
        self._append(about | fields)

    def failed(self, verb: str, variant: str | None, error: BaseException | str, seconds: float = 0.0) -> None:
        """Append the failure event of a stage; `error` may be a plain reason, such as the name of a signal."""
        kind = "Killed" if isinstance(error, str) else type(error).__name__
        message = error if isinstance(error, str) else STOPPED.get(kind) or one_line(error)
        self.emit(verb, "failed", variant, error=kind, message=message, seconds=round(seconds, 3))

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Append figures to plot, such as the training loss at an optimizer step."""
        self._append({"metrics": values, "step": step})

    def models(self, rows: list[dict], figures: dict[str, float]) -> None:
        """Append the figures of all models at the last step, unless the spool has the same rows already.

        Args:
            rows: the figures of one model each, for a table and a picture.
            figures: the figures to plot.
        """
        records = read_events(self.path)[0]
        if rows != next((record["models"] for record in reversed(records) if "models" in record), []):
            step = next((record["step"] for record in reversed(records) if "metrics" in record), 0)
            self._append({"metrics": figures, "step": step, "models": rows})

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Show that `done` of `total` is done, and what is being done."""
        if self._on_progress:
            self._on_progress(done, total, what)

    def show(self, lines: list[str]) -> None:
        """Show lines to people."""
        if self._on_show:
            self._on_show(lines)

    def _append(self, record: dict) -> None:
        line = json.dumps({"time": round(time.time(), 3), "run": self.run, **record}, ensure_ascii=False, default=str)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # A line that a power cut left unfinished must not swallow this one.
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + redact(line).encode("utf-8", "backslashreplace") + b"\n"
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(descriptor)
            if not size:
                sync(self.path.parent)
        finally:
            os.close(descriptor)


class SilentEvents(Events):
    """The events of a process that trains beside the one that writes the spool: they are not stored."""

    def _append(self, record: dict) -> None:
        pass


def alert_level(record: dict) -> Literal["info", "warn", "error"]:
    """Return how serious an event is: a stage that somebody stopped is no error."""
    if not record["event"].endswith("_failed"):
        return "info"
    return "warn" if record.get("error") in STOPPED else "error"


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, without secrets, cut to 500 characters unless it is for people."""
    text = printable(redact(" ".join(str(error).split())) or type(error).__name__)
    return text if isinstance(error, UserError) or len(text) <= 500 else text[:497] + "..."


def read_events(path: Path, offset: int = 0) -> tuple[list[dict], int]:
    """Return the records from a byte offset on, and the offset after the last whole line."""
    if not path.is_file():
        return [], 0
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    records = []
    for line in whole.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # cut off by a power failure; its content is lost
    return records, offset + len(whole)
