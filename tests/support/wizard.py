"""A person at a pseudo-terminal, before a folder with data, and a Hub that knows several tokens."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import TOKEN, Place

READS = "hf_tunepressReadOnlyToken0123456789"
FINE = "hf_tunepressFineGrainedForTests01234"
BOBS = "hf_tunepressTokenOfAnother0123456789"
TOKENS = {
    TOKEN: {"name": "ada"},
    BOBS: {"name": "bob"},
    READS: {"name": "ada", "role": "read"},
    FINE: {"name": "ada", "role": "fineGrained", "writes_to": ["ada/mine"], "orgs": ["lab"]},
}
PATIENCE_SECONDS = 180


@dataclass
class Desk(Place):
    """A folder to work in; `token` is what the environment has."""

    token: str | None = None

    @property
    def env(self) -> dict[str, str]:
        plain = {k: v for k, v in super().env.items() if k != "HF_TOKEN"}
        more = {"XDG_CACHE_HOME": str(self.folder / "cache"), "COLUMNS": "200", "TERM": "dumb"}
        return {**plain, **more, **({"HF_TOKEN": self.token} if self.token else {})}

    def wizard(self, *arguments: str, answers: str = "", check: int = 0) -> subprocess.CompletedProcess:
        """The wizard with answers through a pipe, to its end."""
        done = subprocess.run(
            self.command("wizard", *arguments),
            cwd=self.folder, env=self.env, input=answers, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    @contextlib.contextmanager
    def sit_down(self, *arguments: str, launch: Path | None = None):
        """A person before the wizard, who came by the command or by a launch.sh, and leaves when the block ends."""
        person = Person(self, [str(launch), *arguments] if launch else self.command("wizard", *arguments))
        try:
            yield person
        finally:
            person.leave()

    def hidden_in(self, secret: str) -> list[Path]:
        """The files here that hold a secret."""
        found = (path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())
        return [path for path in found if secret.encode() in path.read_bytes()]


class Person:
    """Reads what the terminal shows, and types."""

    def __init__(self, desk: Desk, command: list[str]):
        self.screen, self._read = "", 0
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.chdir(desk.folder)
            os.execve(command[0], command, desk.env)

    def sees(self, text: str) -> None:
        """Wait until the text stands behind all that was seen before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.screen[self._read :]:
            assert time.monotonic() < deadline and self._look(), f"no {text!r} on the screen:\n{self.screen}"
        self._read = self.screen.index(text, self._read) + len(text)

    def types(self, line: str) -> None:
        os.write(self._terminal, line.encode() + b"\r")

    def answers(self, question: str, line: str = "") -> None:
        self.sees(question + " [")
        self.sees("]: ")
        self.types(line)

    def presses(self, key: str) -> None:
        os.write(self._terminal, key.encode())

    def ends(self) -> int:
        """The exit code, once the command has ended."""
        while self._look():
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        self._process = 0
        return code

    def leave(self) -> None:
        os.close(self._terminal)  # which hangs up
        if self._process:
            os.waitpid(self._process, 0)

    def _look(self) -> bool:
        """Read what is new; False where nothing more can come."""
        ready, _, _ = select.select([self._terminal], [], [], PATIENCE_SECONDS)
        assert ready, f"nothing happens any more:\n{self.screen}"
        try:
            fresh = os.read(self._terminal, 65536)
        except OSError:  # the other side is closed
            return False
        self.screen += fresh.decode(errors="replace").replace("\r\n", "\n")
        return bool(fresh)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
