"""A stage in a process of its own: its start, its messages and its end.

The end of the process frees its memory, and a kill by the system still yields a failure event.
The child sends its messages (progress, outcome, error) over its standard input, which is a socket.
It writes its output to `logs/`, and ends when this process ends. If `accelerate launch` starts
several processes for a stage, they share that socket, and this process reports the failure.
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
from pipeline.tracking.events import STOPPED, Events
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
    interrupted: bool = False  # the stage finished, and the run must stop after it


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
    ) -> Report:
        """Run one stage to its end, with the arguments of `run_stage`."""
        ...


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
        reporter: receives the stage's progress and lines.
        on_tick: called a few times a second, to forward events and to redraw.
        launch: starts several processes; by default one.
        grace: seconds that the stage may take to end after a signal.

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
            stdin=theirs.fileno(),
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
        ours.close()  # remaining processes of the stage end at this
    seconds, outcome = time.monotonic() - start, messages.outcome
    if child.returncode == 0 and outcome is not None:
        return Report([Path(p) for p in outcome["outputs"]], outcome["summary"], seconds, interrupted)
    error, ended = messages.error(launch), _how_it_ended(child.returncode)
    if error and launch and (verb := REPORTING[stage].verb):
        message = STOPPED.get(error["type"], error["message"])
        events.emit(verb, "failed", error=error["type"], message=message, seconds=round(seconds, 3))
    if not error:  # a stage that does not end in time after Ctrl-C is killed
        tell_failure(stage, events, variants, KeyboardInterrupt() if interrupted else ended, seconds)
    if interrupted:
        raise Interrupted
    if error:
        raise StageFailed(error["told"], error["exit_code"], workspace.log_of(stage, variants, error["rank"]))
    raise StageFailed(f"{stage}: {ended}", 1, log_path)


def _command(launch: Launch | None, arguments: tuple[str, ...]) -> list[str]:
    if launch:
        return launch.command("pipeline.workflow.stages", *arguments)
    # -P: the current folder may contain another package `pipeline`.
    return [sys.executable, "-P", "-m", "pipeline.workflow.stages", *arguments]


def _watch(child: subprocess.Popen, messages: _Messages, on_tick: Callable[[], None], grace: float) -> bool:
    """Wait for the child, and pass SIGINT and SIGTERM on to it. Return True if one came."""
    stopping: list[float] = []

    def stop(number: int, frame: object) -> None:
        if not stopping:
            child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        stopping.append(time.monotonic())
        if len(stopping) > 2:  # the third Ctrl-C ends the stage at once
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
    """Messages of one or several child processes: lines of JSON on a shared socket."""

    def __init__(self, end: socket.socket, reporter: Reporter):
        self._socket, self._reporter = end, reporter
        self._buffer = b""
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._selector.register(end, selectors.EVENT_READ)
        self._errors: list[dict] = []
        self._finished: set[int] = set()  # ranks of processes that finished their work
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
        """Return the first failure that is a cause, and not the consequence of another process's failure."""
        causes = [error for error in self._errors if not error["echo"]]
        silent = set(launch.ranks_here) - self._finished - {e["rank"] for e in self._errors} if launch else set()
        if launch and not causes and silent and (self._errors or self._finished):
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
                continue  # two processes wrote at once; their logs have both messages
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
        return "killed by the system (SIGKILL), most often because memory ran out. Try: smaller settings"
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no result"
