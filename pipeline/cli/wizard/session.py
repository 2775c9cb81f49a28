"""One session of the wizard: from the first question to a file, or to the answers that an interruption leaves."""

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
OURS = re.compile(r"wizard-answers(-\d+)?\.yaml")  # what such files are called, as many as there are


@dataclass(frozen=True)
class Written:
    """The configuration that came out, and whether to run it now."""

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
    """Ask what is not answered yet, write the configuration, and say whether to begin.

    Args:
        answers: given ahead, by the questions' names.
        resume: a file of answers that an interrupted session left.
        yes: take defaults for the rest.
        overwrite: replace a configuration file that says something else.

    Raises:
        UserError: for a wrong answer where nobody can be asked again.
        Stopped: by Ctrl-C and the like; the answers are kept in a file.
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
                    "Answer, or press Enter for what stands in brackets. Ctrl-C keeps your answers in a file."
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
            f"{draft.written}: is written and not started, for this machine has too little for it; change it as "
            f"said above, or start it as it is: {draft.command('run', draft.written)}"
        )
    assert draft.written is not None, "the last question writes the configuration"
    return Written(draft.written, draft.start)


def read_answers(path: Path) -> dict[str, str]:
    """Return the answers that an interrupted session left.

    Raises:
        ConfigError: where the file holds none.
    """
    try:
        found = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ConfigError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not YAML, so no answers of the wizard") from None
    known = {question.name for question in QUESTIONS}
    is_flat = isinstance(found, dict) and not any(isinstance(value, (dict, list)) for value in found.values())
    if not is_flat or not found.keys() <= known:
        raise ConfigError(f"{path}: no answers of the wizard; a configuration is run with: {command('run', path)}")
    return {name: answer_text(value) for name, value in found.items()}


def _leave(draft: Draft, answers: Mapping[str, str], resume: Path | None) -> str:
    """Keep what was answered, and say how to go on."""
    if draft.written:
        return f"stopped; the configuration is written, run it with: {draft.command('run', draft.written)}"
    if not answers:
        return "stopped; nothing was answered yet"
    body = redact(yaml.safe_dump(dict(answers), sort_keys=False, allow_unicode=True))
    places = [resume or _free(Path(LEFT)), _free(Path(tempfile.gettempdir()) / LEFT)]
    for path in places:
        again = draft.command("wizard", "--resume", path)
        about = f"# Answers of a wizard that was stopped; no token is among them. Go on with: {again}\n"
        try:
            write_text(path, about + body)
        except OSError:  # here nothing can be written, or not there either
            continue
        return f"stopped; your answers are in {path}, go on with: {again}"
    return f"stopped; your answers could not be written, neither to {places[0]} nor to {places[1]}"


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
