"""A stage in a process of its own: start it, watch it, and report its end.

Its memory comes back when it ends, and a kill by the system still yields its failure
event. The child reports over its standard input, which is a socket (progress, outcome, error),
writes its chatter to `logs/`, and ends when this process does. Where `accelerate launch` makes
several processes of a stage, they share that socket, and this process reports the failure.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import Interrupted, StageFailed
from pipeline.system.process_environment import STAGE_SETTINGS, with_own_package
from pipeline.tracking.events import Events
from pipeline.training.accelerate_launch import Launch
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.stages import REPORTING, tell_failure
from pipeline.workflow.workspace import Workspace

GRACE_SECONDS = 20.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Report:
    """The report of a finished stage."""

    outputs: list[Path]
    summary: dict
    seconds: float
    interrupted: bool = False  # it finished, and then the run is to stop


class StartStage(Protocol):
    """A way to run one stage to its end: `run_stage`, or `in_process.run_stage_here`."""

    def __call__(
        self,
        stage: str,
        variants: tuple[str, ...],
        workspace: Workspace,
        events: Events,
        reporter: Reporter,
        on_tick: Callable[[], None],
        launch: Launch | None = None,
    ) -> Report: ...


def run_stage(
    stage: str,
    variants: tuple[str, ...],
    workspace: Workspace,
    events: Events,
    reporter: Reporter,
    on_tick: Callable[[], None],
    launch: Launch | None = None,
    grace: float = GRACE_SECONDS,
) -> Report:
    """Run one stage to its end.

    Args:
        stage: name of a module in `pipeline.workflow.stages`.
        reporter: receives its progress, and the lines that it shows.
        on_tick: called a few times a second, to forward events and to redraw.
        launch: makes several processes of it; by default it is one.
        grace: seconds that it may take to end after it was asked to.

    Raises:
        StageFailed: with the stage's own message; its exit code is 2 if the user can correct the cause.
        Interrupted: after the stage has ended, if Ctrl-C or SIGTERM came.
    """
    workspace.logs.mkdir(parents=True, exist_ok=True)
    log_path = workspace.log_of(stage, variants)
    ours, theirs = socket.socketpair()
    arguments = (str(workspace.folder), stage, *variants)
    start = time.monotonic()
    more = launch.environment() if launch else {}
    with open(log_path, "wb") as log:
        child = subprocess.Popen(
            _command(launch, arguments),
            stdin=theirs,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**STAGE_SETTINGS, **with_own_package(os.environ), **more},
        )
    theirs.close()
    messages = _Messages(ours, reporter)
    try:
        interrupted = _watch(child, messages, on_tick, grace)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        messages.drain()
        ours.close()  # upon which processes that may be left of it end too
    finished = child.returncode == 0 and messages.outcome is not None
    error = None if finished else messages.error(launch)
    if error and launch:
        seconds = round(time.monotonic() - start, 3)
        events.emit(REPORTING[stage].verb, "failed", error=error["type"], message=error["message"], seconds=seconds)
    if not finished and not error:
        tell_failure(stage, events, variants, _how_it_ended(child.returncode), time.monotonic() - start)
    if interrupted and not finished:
        raise Interrupted
    if error:
        log_path = workspace.log_of(stage, variants, error["rank"])
        raise StageFailed(error["told"], error["exit_code"], log_path)
    if not finished:
        raise StageFailed(f"{stage}: {_how_it_ended(child.returncode)}", 1, log_path)
    outcome = messages.outcome
    outputs = [Path(p) for p in outcome["outputs"]]
    return Report(outputs, outcome["summary"], time.monotonic() - start, interrupted)


def _command(launch: Launch | None, arguments: tuple[str, ...]) -> list[str]:
    if launch:
        return launch.command("pipeline.workflow.stages", *arguments)
    # -P: the folder that the user stands in may have a `pipeline` of its own.
    return [sys.executable, "-P", "-m", "pipeline.workflow.stages", *arguments]


def _watch(child: subprocess.Popen, messages: _Messages, on_tick: Callable[[], None], grace: float) -> bool:
    """Wait for the child, and pass SIGINT and SIGTERM on to it. Return True if one came."""
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
            if stopping and time.monotonic() - stopping[0] > grace:
                child.kill()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return bool(stopping)


class _Messages:
    """Lines of JSON from the socket that the child, or several children, write to."""

    def __init__(self, end: socket.socket, reporter: Reporter):
        self._socket, self._reporter = end, reporter
        self._buffer = b""
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(end, selectors.EVENT_READ)
        self._errors: list[dict] = []
        self._finished: set[int] = set()  # ranks of processes that came to their end
        self.outcome: dict | None = None

    def wait(self, seconds: float) -> None:
        if not self._open:
            time.sleep(seconds)
        elif self._selector.select(seconds):
            self._read()

    def drain(self) -> None:
        while self._open and self._selector.select(0):
            self._read()
        self._selector.close()

    def error(self, launch: Launch | None) -> dict | None:
        """Return the first failure that a process reported: the cause, not its consequences in other processes."""
        causes = [error for error in self._errors if not error["echo"]]
        silent = set(launch.ranks_here) - self._finished - {e["rank"] for e in self._errors} if launch else set()
        if not causes and silent and (self._errors or self._finished):
            rank = min(silent)
            message = f"process {rank} of {launch.processes} {_how_it_ended(-signal.SIGKILL)}"
            return {"type": "Killed", "message": message, "told": f"train: {message}", "exit_code": 1, "rank": rank}
        return next(iter(causes + self._errors), None)

    def _read(self) -> None:
        try:
            data = self._socket.recv(65536)
        except ConnectionResetError:
            data = b""
        self._open = bool(data)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # two processes wrote at once; both have it in their logs
            if "progress" in message:
                self._reporter.progress(*message["progress"])
            if "show" in message:
                self._reporter.show(message["show"])
            if "error" in message:
                self._errors.append(message["error"])
            if "finished" in message:
                self._finished.add(message["finished"])
            self.outcome = message.get("outcome", self.outcome)


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system (SIGKILL), most often because memory ran out; run it again with smaller settings"
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no result"
