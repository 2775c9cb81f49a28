"""A session of the wizard: it ends with a configuration file, or keeps the answers if it is interrupted."""

from __future__ import annotations

import contextlib
import getpass
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.markup import escape

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.prompts import Asker, answer_text, yes_or_no
from pipeline.cli.wizard.questions import QUESTIONS
from pipeline.config.loader import read_yaml
from pipeline.errors import ConfigError, redact
from pipeline.system.command_names import command
from pipeline.system.files import write_text

if TYPE_CHECKING:
    from rich.console import Console

LEFT = "wizard-answers.yaml"
OURS = re.compile(r"wizard-answers(-\d+)?\.yaml")  # the names of such files


@dataclass(frozen=True)
class Written:
    """The configuration that was written, and whether to run it now."""

    path: Path
    start: bool


class Stopped(Exception):
    """The person stopped; `str(error)` says how to go on."""


def wizard(
    console: Console,
    answers: Mapping[str, str],
    resume: Path | None = None,
    yes: bool = False,
    runs: Path = Path("runs"),
    overwrite: bool = False,
) -> Written:
    """Ask every question without an answer, and write the configuration.

    Args:
        answers: answers of the command line, by the names of the questions.
        resume: the file with the answers of an interrupted session.
        yes: take the defaults of all other questions.
        overwrite: replace a file that holds another configuration.

    Raises:
        UserError: if an answer is wrong and nobody can be asked again.
        Stopped: if the user interrupts; the answers are kept in a file.
    """
    at_terminal = sys.stdin.isatty() and not yes
    draft = Draft(
        runs=runs,
        tell=lambda line: console.print(escape(line)),
        secret=getpass.getpass if at_terminal else None,
        confirm=_confirm(console) if at_terminal else None,
        given=dict(answers),
        remembered=read_answers(resume) if resume else {},
        overwrite=overwrite,
    )
    asker = Asker(console, draft, yes, at_terminal)
    try:
        with _signals_as_interrupts():
            if at_terminal:
                console.print(
                    "Type an answer, or press Enter for the default in brackets. Ctrl-C saves your answers in a file."
                )
            asker.ask_all(QUESTIONS)
    except (KeyboardInterrupt, EOFError):  # Ctrl-D where a secret is asked for
        raise Stopped(_leave(draft, asker.known, resume)) from None
    except Exception:  # of a wrong answer given ahead, or a bug of ours; what was typed before it is kept
        if at_terminal and asker.answers.keys() - answers.keys():
            draft.tell(_leave(draft, asker.known, resume))
        raise
    if resume and OURS.fullmatch(resume.name):
        with contextlib.suppress(OSError):  # a folder in which nothing can be removed
            resume.unlink(missing_ok=True)
    if yes and draft.too_large and not draft.start and not draft.is_known("run"):
        raise ConfigError(
            f"{draft.written}: written but not started: this machine is too small for it. Try: the changes above, "
            f"or start it unchanged with {draft.command('run', draft.written)}"
        )
    assert draft.written is not None, "the last question writes the configuration"
    return Written(draft.written, draft.start)


def read_answers(path: Path) -> dict[str, str]:
    """Return the answers of an interrupted session.

    Raises:
        ConfigError: if the file holds no answers.
    """
    try:
        found = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ConfigError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a file of wizard answers (not YAML)") from None
    known = {question.name for question in QUESTIONS}
    is_flat = isinstance(found, dict) and not any(isinstance(value, (dict, list)) for value in found.values())
    if not is_flat or not found.keys() <= known:
        raise ConfigError(f"{path}: not a file of wizard answers. Try, for a configuration: {command('run', path)}")
    return {name: answer_text(value) for name, value in found.items()}


def _leave(draft: Draft, answers: Mapping[str, str], resume: Path | None) -> str:
    """Save the answers, and return a line that says how to continue."""
    if draft.written:
        return f"stopped. The configuration is written. Run it with: {draft.command('run', draft.written)}"
    if not answers:
        return "stopped before the first answer"
    body = redact(yaml.safe_dump(dict(answers), sort_keys=False, allow_unicode=True))
    places = [resume or _free(Path(LEFT)), _free(Path(tempfile.gettempdir()) / LEFT)]
    for path in places:
        again = draft.command("wizard", "--resume", path)
        about = f"# Answers of an interrupted wizard. This file contains no token. Continue with: {again}\n"
        try:
            write_text(path, about + body)
        except OSError:  # a folder without write access, or a full disk
            continue
        return f"stopped. Your answers are in {path}. Continue with: {again}"
    return f"stopped. Your answers could not be saved (neither {places[0]} nor {places[1]} can be written)"


def _free(path: Path) -> Path:
    """Return the path, or the next free one if it exists."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free


def _confirm(console: Console) -> Callable[[str], bool]:
    def ask(what: str) -> bool:
        console.print(escape(what), end="")
        sys.stdout.flush()
        with contextlib.suppress(ConfigError):
            return yes_or_no(sys.stdin.readline())
        return False

    return ask


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Treat a closed terminal and a request to end as an interrupt, so that the answers are kept."""

    def stop(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
