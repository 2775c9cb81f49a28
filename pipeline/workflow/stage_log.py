"""The output of a process, that of C libraries included, written to a file without tokens."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

from pipeline.errors import redact

LONGEST = 1 << 20  # bytes of an unfinished line that are held back
OVERLAP = 4096  # bytes of a longer line that are held back: more than a token has
PATIENCE = 2.0  # seconds that the end of a process waits for its output to be written

_BREAK = re.compile(rb"(?<=[\n\r])")


def print_without_tokens(file: int) -> int:
    """Write the output of this process to the open `file` from now on, without tokens.

    A process of its own does the writing, so that the last words of a killed process are kept. Call this while there
    are no threads.

    Returns:
        The id of the writing process.
    """
    reads, writes = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    writer = os.fork()
    if not writer:
        _become_writer(reads, writes, file)
    os.close(reads)
    for number in (1, 2):
        os.dup2(writes, number)
    os.close(writes)
    return writer


def wait_for(writer: int) -> None:
    """End the output of this process, and wait until it is written; output of other processes is not waited for."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nothing, number)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not os.waitpid(writer, os.WNOHANG)[0]:
        time.sleep(0.005)


def _become_writer(reads: int, writes: int, file: int) -> None:
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it ends after those whose words it writes
        os.close(writes)
        os.close(0)  # by which a stage's parent knows that it has ended
        _copy(reads, file)
    finally:
        os._exit(0)


def _copy(reads: int, file: int) -> None:
    rest = b""
    while data := os.read(reads, 1 << 16):
        *lines, rest = _BREAK.split(rest + data)
        if len(rest) > LONGEST:
            rest = _without_tokens(rest)
            lines, rest = [*lines, rest[:-OVERLAP]], rest[-OVERLAP:]
        _write(file, b"".join(lines))
    _write(file, rest)


def _write(file: int, data: bytes) -> None:
    data = _without_tokens(data)
    while data:
        data = data[os.write(file, data) :]


def _without_tokens(data: bytes) -> bytes:
    return redact(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
