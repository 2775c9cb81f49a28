"""A Python that imports the heavy libraries once, and forks a process for each program that is asked for.

    python -I server.py DESCRIPTOR

The descriptor is of a listening socket, at which `client.py` asks. A fork takes arguments, environment, folder and
streams of its client, runs the program as a Python would that was just started, and is killed if its client ends
first. The server ends at the end of its standard input.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import site
import socket
import sys
import tempfile
import threading
import types

# What runs import, in which nearly all the time of a small one is spent.
MODULES = (
    "torch", "transformers", "peft", "trl", "datasets", "torchao.quantization", "bitsandbytes", "trackio", "gguf",
    "matplotlib.pyplot", "matplotlib.backends.backend_agg", "pydantic.main", "pydantic.type_adapter", "pydantic.types",
    "pydantic._internal._generate_schema", "typer", "rich.progress", "rich._emoji_codes", "jinja2", "yaml",
    "transformers.trainer", "trl.trainer.sft_trainer", "peft.tuners.lora", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.modeling_auto",
    "transformers.integrations.torchao", "numpy.ctypeslib",
)  # fmt: skip
BY_CTRL_C = -signal.SIGINT  # not an exit code: Python ends by the signal then
KNOWS_THE_ENVIRONMENT = ("trackio", "wandb")  # imported again by each fork, which takes little without what they import


class Server:
    """Forks, passes signals on, and tells how each fork ended."""

    def __init__(self, listener: int):
        self._listener = socket.socket(fileno=listener)
        self._forks: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._ended, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for end in (self._listener, self._ended, 0):
            self._selector.register(end, selectors.EVENT_READ)
        self._has_imported = False

    def serve(self) -> dict:
        """Return, in a fork, what it is asked for. In the server itself this does not return."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == 0:
                    self._end()
                elif key.fileobj == self._ended:
                    os.read(self._ended, 4096)
                    self._tell()
                elif key.data in self._forks:  # and has not just been told of
                    self._hear(key.fileobj, key.data)
                elif key.fileobj is self._listener and (request := self._fork(self._listener.accept()[0])):
                    return request

    def _fork(self, connection: socket.socket) -> dict | None:
        """Return the request in the fork, which has its streams then, and None in the server."""
        if not self._has_imported:
            self._has_imported = True
            import_all()
        streams = array.array("i")
        head, passed, _, _ = connection.recvmsg(8, socket.CMSG_LEN(3 * streams.itemsize))
        for _, _, data in passed:
            streams.frombytes(data)
        request = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        if pid := os.fork():
            for stream in streams:
                os.close(stream)
            self._forks[pid] = connection
            self._selector.register(connection, selectors.EVENT_READ, pid)
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        os.close(self._ended)
        for end in (self._listener, connection, *self._forks.values()):
            end.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return json.loads(request)

    def _hear(self, connection: socket.socket, pid: int) -> None:
        """Pass signals on to a fork, and kill one whose client has gone."""
        numbers = b""
        with contextlib.suppress(ConnectionError):
            numbers = connection.recv(16)
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
        if not numbers:
            self._selector.unregister(connection)

    def _tell(self) -> None:
        """Tell the clients of forks that have ended how they did."""
        while self._forks and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            connection = self._forks.pop(ended[0])
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            with contextlib.suppress(OSError):
                connection.sendall(ended[1].to_bytes(4, "big"))
            connection.close()

    def _end(self) -> None:
        for pid in self._forks:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def import_all() -> None:
    """Import what programs will need; forget the packages that read the environment of their program."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        for name in MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in KNOWS_THE_ENVIRONMENT]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # a collection in a fork would otherwise copy all that memory


def become(request: dict) -> None:
    """Make this process the one that Python would be if it had just been started with the request."""
    os.chdir(request["folder"])
    os.umask(request["umask"])
    sys.executable = request["executable"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        new = os.fdopen(number, "w" if number else "r", encoding=old.encoding, errors=old.errors, closefd=False)
        new.reconfigure(line_buffering=number == 2 or os.isatty(number))
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    take_environment(request["environment"])
    if "-I" not in request["options"]:
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if not request["options"]:
        program = request["words"][0]
        beside = os.path.dirname(os.path.realpath(program))
        sys.path.insert(0, {"-c": "", "-m": os.getcwd()}.get(program, beside))
    site.execsitecustomize()


def take_environment(environment: dict[str, str]) -> None:
    """Replace the environment, and what imported libraries have taken from the server's."""
    from huggingface_hub import constants, hf_api

    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    importlib.reload(constants)
    values = {name: value for name, value in vars(constants).items() if name.isupper()}
    values["HF_MODULES_CACHE"] = os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("huggingface_hub", "transformers"):
            vars(module).update({key: values[key] for key in values.keys() & vars(module).keys()})
    hf_api.api.endpoint = constants.ENDPOINT
    importlib.reload(importlib.import_module("datasets.config"))


def run(words: list[str]) -> int:
    """Run `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...` as the main program; return its exit code."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = words if words[0] not in ("-m", "-c") else [words[0], *words[2:]]
    try:
        if words[0] == "-m":
            runpy._run_module_as_main(words[1])
        elif words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), vars(main))
        else:
            main.__file__ = os.path.abspath(words[0])
            with open(words[0], "rb") as file:
                exec(compile(file.read(), words[0], "exec"), vars(main))
    except SystemExit as end:
        if isinstance(end.code, (int, type(None))):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as problem:
        problem = problem.with_traceback(problem.__traceback__.tb_next)  # without this function
        sys.excepthook(type(problem), problem, problem.__traceback__)
        return BY_CTRL_C if isinstance(problem, KeyboardInterrupt) else 1
    return 0


def finish(code: int) -> None:
    """End as Python does, without taking memory apart."""
    with contextlib.suppress(BaseException):
        threading._shutdown()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == BY_CTRL_C:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


if __name__ == "__main__":
    request = Server(int(sys.argv[1])).serve()
    become(request)
    finish(run(request["words"]))
