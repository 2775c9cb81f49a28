"""Log of a stage: the output of its process and of C libraries in it, with tokens removed."""

from __future__ import annotations

import os
import signal
import sys
import time

from pipeline.system.redaction import Redactor

WAIT_SECONDS = 2.0  # that the end of a process waits for its output to be written


def print_without_tokens(file: int) -> int:
    """Write the output of this process to an open file from now on, without tokens.

    Another process does the writing, so that the last output of a killed process is kept. Call this before the
    first thread starts.

    Args:
        file: file descriptor.

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
    """End the output of this process, and wait until it is written, but not for output of other processes."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end and not os.waitpid(writer, os.WNOHANG)[0]:
        time.sleep(0.005)


def _become_writer(reads: int, writes: int, file: int) -> None:
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it must end after the processes that it writes for
        os.close(writes)
        os.close(0)  # otherwise the parent of the stage would not see that the stage has ended
        _copy(reads, file)
    finally:
        os._exit(0)


def _copy(reads: int, file: int) -> None:
    redactor = Redactor()
    while data := os.read(reads, 1 << 16):
        _write(file, redactor.feed(data.decode("utf-8", "surrogateescape")))
    _write(file, redactor.end())


def _write(file: int, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    while data:
        data = data[os.write(file, data) :]
