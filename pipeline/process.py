"""A stage in a process of its own: started, watched, and its end told.

Its memory comes back when it ends, and a kill by the system still yields its failure
event. The child reports over a pipe (progress, outcome, error), writes its chatter to
`logs/`, and ends when this process does.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Interrupted, StageFailed
from pipeline.events import Events
from pipeline.reporter import Reporter
from pipeline.workspace import Workspace

GRACE_SECONDS = 20.0  # how long a stage may take to end after it was asked to
POLL_SECONDS = 0.2

# glibc gives every large block back to the system at once, and the next one costs page faults
# again; training on a CPU spends more time on those than on arithmetic. Keep the memory.
ALLOCATOR = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


@dataclass(frozen=True)
class Report:
    """What a finished stage said of itself."""

    outputs: list[Path]
    summary: dict
    seconds: float
    interrupted: bool = False  # it finished, and then the run is to stop


def run_stage(
    stage: str,
    verb: str,
    variants: tuple[str, ...],
    workspace: Workspace,
    events: Events,
    reporter: Reporter,
    on_tick: Callable[[], None],
) -> Report:
    """Run one stage to its end.

    Args:
        stage: module under `pipeline.stages`.
        verb: whose events it sends; the parent sends the failure event of a killed stage.
        reporter: is told of its progress, and shows what it has to show.
        on_tick: called a few times a second, to forward events and to redraw.

    Raises:
        StageFailed: with the stage's own message; its exit code is 2 where the user can mend it.
        Interrupted: after the stage has ended, where Ctrl-C or SIGTERM came.
    """
    workspace.logs.mkdir(parents=True, exist_ok=True)
    log_path = workspace.logs / f"{'-'.join((stage, *variants))}.log"
    reader, writer = os.pipe()
    # -P: the folder that the user stands in may have a `pipeline` of its own.
    command = [sys.executable, "-P", "-m", "pipeline.stages", str(workspace.folder), stage, str(writer), *variants]
    start = time.monotonic()
    with open(log_path, "wb") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            start_new_session=True,
            env={"GLIBC_TUNABLES": ALLOCATOR, **with_own_package(os.environ)},
        )
    os.close(writer)
    messages = _Messages(reader, reporter)
    try:
        interrupted = _watch(child, messages, on_tick)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        messages.drain()
        os.close(reader)
        child.stdin.close()
    if interrupted and (child.returncode != 0 or messages.outcome is None):
        if not messages.error:
            _tell_all(events, verb, variants, _how_it_ended(child.returncode), start)
        raise Interrupted
    if messages.error:
        raise StageFailed(messages.error["message"], messages.error["exit_code"], log_path)
    if child.returncode != 0 or messages.outcome is None:
        reason = _how_it_ended(child.returncode)
        _tell_all(events, verb, variants, reason, start)
        raise StageFailed(f"{stage}: {reason}", 1, log_path)
    outcome = messages.outcome
    outputs = [Path(p) for p in outcome["outputs"]]
    return Report(outputs, outcome["summary"], time.monotonic() - start, interrupted)


def with_own_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which `python -P` finds this very package, installed or not."""
    paths = [str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _watch(child: subprocess.Popen, messages: _Messages, on_tick: Callable[[], None]) -> bool:
    """Wait for the child; pass SIGINT and SIGTERM on to it. True if one came."""
    stopping: list[float] = []

    def stop(number, frame):
        if not stopping:
            child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        stopping.append(time.monotonic())
        if len(stopping) > 2:  # whoever presses Ctrl-C three times means it
            child.kill()

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while child.poll() is None:
            messages.wait(POLL_SECONDS)
            on_tick()
            if stopping and time.monotonic() - stopping[0] > GRACE_SECONDS:
                child.kill()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return bool(stopping)


class _Messages:
    """Lines of JSON from the child's pipe."""

    def __init__(self, descriptor: int, reporter: Reporter):
        self._descriptor, self._reporter = descriptor, reporter
        self._buffer = b""
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)
        self.outcome: dict | None = None
        self.error: dict | None = None

    def wait(self, seconds: float) -> None:
        if not self._open:
            time.sleep(seconds)
        elif self._selector.select(seconds):
            self._read()

    def drain(self) -> None:
        while self._open and self._selector.select(0):
            self._read()
        self._selector.close()

    def _read(self) -> None:
        data = os.read(self._descriptor, 65536)
        self._open = bool(data)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                self._reporter.progress(*message["progress"])
            if "show" in message:
                self._reporter.show(message["show"])
            self.outcome = message.get("outcome", self.outcome)
            self.error = message.get("error", self.error)


def _tell_all(events: Events, verb: str | None, variants: tuple[str, ...], reason: str, start: float) -> None:
    if verb is None:
        return
    for variant in (variants if verb == "quantize" else ()) or (None,):
        events.failed(verb, variant, reason, time.monotonic() - start)


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system (SIGKILL), most often for want of memory; run it again with smaller settings"
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no result"
