"""The benchmark of plans in a process of its own, which a time limit ends: `python -m ... PLACE`.

On a slow or busy machine a single step can take minutes, and nothing else can end it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict

from pipeline.errors import UserError, WorkspaceError
from pipeline.planning.benchmark import Speeds, measure
from pipeline.system.process_environment import with_own_package

LIMIT_SECONDS = 120.0  # six times as long as usual


def measure_in_time(place: str, tell: Callable[[str], None], limit: float = LIMIT_SECONDS) -> Speeds:
    """Return the speeds of this machine, measured in another process.

    Args:
        place: the machine's name.
        tell: receives the name of each measurement when it starts.
        limit: seconds that all measurements may take.

    Raises:
        WorkspaceError: if they take longer, or fail.
    """
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, place],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=with_own_package(os.environ),
        )
        assert child.stdout, "its output is a pipe"
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            child.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        message: dict = {}
        try:
            for line in child.stdout:
                message = json.loads(line)
                if "starts" in message:
                    tell(message["starts"])
        finally:
            timer.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
        if "speeds" in message:
            return Speeds(**message["speeds"])
        if is_late.is_set():
            raise WorkspaceError(
                f"{place}: not measured within {limit:.0f} s, so plans tell no times. Try: again when it is idle"
            )
        errors.seek(0)
        reason = message.get("problem") or (errors.read().strip().splitlines() or ["no result"])[-1]
        raise WorkspaceError(reason if "problem" in message else f"{place}: not measured ({reason})")


def _main(place: str) -> None:
    def send(**message: object) -> None:
        print(json.dumps(message), flush=True)

    try:
        send(speeds=asdict(measure(place, lambda what: send(starts=what))))
    except UserError as error:
        send(problem=str(error))


if __name__ == "__main__":
    _main(sys.argv[1])
