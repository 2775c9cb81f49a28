"""A tracker's server in a process of its own, on a free port of loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx


class ServerProcess:
    """A server that can be stopped and started again at the same address.

    Attributes:
        program: its source in Python, which takes the port as its argument.
        health: the path that answers when the server is ready.
    """

    program: str
    health: str
    _process: subprocess.Popen | None = None

    def find_port(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run_process(self, seconds: float, **settings: Any) -> None:
        """Start the process, and wait until the server answers."""
        self._process = subprocess.Popen([sys.executable, "-c", self.program, str(self.port)], **settings)
        eventually(self._answers, seconds=seconds)

    def stop(self) -> None:
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process.poll() is None
        try:
            return httpx.get(f"{self.url}{self.health}").is_success
        except httpx.HTTPError:
            return False


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until a condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.02)
