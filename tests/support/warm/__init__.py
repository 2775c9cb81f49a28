"""Processes of Python that start at once: forks of one that has imported the heavy libraries already.

A whole run has five processes or more, and importing torch, transformers and trl costs each of them seconds. While
tests run, `sys.executable` therefore names a program that has such a fork made and ends as the fork ends. The fork is
a process of its own in everything else: arguments, environment, folder, streams, memory, signals, exit code. `COLD`
names the real Python, for tests that look at processes themselves and for some that see the whole as people have it.
"""

from __future__ import annotations

import json
import multiprocessing.spawn  # noqa: F401  which keeps the real Python for itself, since it hands down descriptors
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.warm.client import early

COLD = sys.executable
HERE = Path(__file__).parent


def is_possible() -> bool:
    """Return True if processes can be forked once the libraries are imported: on Linux, where no GPU is initialised."""
    return sys.platform == "linux" and not any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd"))


class WarmPython:
    """The process that forks are made of, with the program that asks for them; it imports at the first request."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self.program, address = self._folder / "python", str(self._folder / "socket")
        client = (HERE / "client.py").read_text(encoding="utf-8")
        self.program.write_text(f"#!{COLD} -IS\n{client}", encoding="utf-8")
        self.program.chmod(0o755)
        about = {"python": COLD, "server": address, "early": early(dict(os.environ))}
        (self._folder / "warm.json").write_text(json.dumps(about), encoding="utf-8")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            self._server = subprocess.Popen(
                [COLD, "-I", HERE / "server.py", str(listener.fileno())],
                stdin=subprocess.PIPE, start_new_session=True, pass_fds=[listener.fileno()],
            )  # fmt: skip

    def close(self) -> None:
        """End it, with what is left of its forks."""
        self._server.communicate()
        shutil.rmtree(self._folder)
