"""The program that stands for Python in tests: it asks the server for a process, and ends as that process ends.

A copy of this file with `warm.json` beside it is what `sys.executable` names. It starts the real Python when the
server cannot help: for other options, and for other values of variables that libraries read while they are loaded.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys

EARLY = ("LD_", "OMP_", "MKL_", "KMP_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH_", "PYTORCH_", "CUDA_", "ACCELERATE_")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def early(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that Python and libraries read while they are loaded."""
    # Which the server follows, nobody sees, or the library reads when it multiplies.
    own = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    return {
        name: value for name, value in environment.items() if name.startswith((*EARLY, "PYTHON")) and name not in own
    }


def understood(arguments: list[str]) -> tuple[list[str], list[str]] | None:
    """Return the options, and the program with its arguments; None for what the server does not know."""
    options, words = [], list(arguments)
    while words and words[0] in ("-I", "-P"):
        options.append(words.pop(0))
    if not words or (words[0].startswith("-") and (words[0] not in ("-m", "-c") or len(words) < 2)):
        return None
    return options, words


def ask(server: str, options: list[str], words: list[str]) -> int:
    """Have the server run a program, pass signals on to it, and return its status as `os.wait` tells it."""
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "options": options, "words": words, "environment": dict(os.environ), "folder": os.getcwd(), "umask": umask,
        "executable": sys.argv[0],
    }  # fmt: skip
    data = json.dumps(request).encode()
    streams = array.array("i", map(_or_nothing, (0, 1, 2))).tobytes()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        for number in FORWARDED:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        connection.sendmsg([len(data).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(data)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):  # the program alone holds its streams
            os.dup2(nothing, number)
        answer = connection.recv(4)
    return int.from_bytes(answer, "big") if len(answer) == 4 else signal.SIGKILL


def _or_nothing(descriptor: int) -> int:
    """Return an open descriptor as it is, and one of nothing in place of a closed one."""
    try:
        os.fstat(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_RDWR)
    return descriptor


def main() -> None:
    with open(os.path.join(os.path.dirname(sys.argv[0]), "warm.json"), encoding="utf-8") as file:
        about = json.load(file)
    asked = understood(sys.argv[1:])
    if asked is None or early(dict(os.environ)) != about["early"]:
        os.execv(about["python"], [about["python"], *sys.argv[1:]])
    status = ask(about["server"], *asked)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
