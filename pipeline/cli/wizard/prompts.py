"""Questions and answers: typed at a terminal, read from a pipe, or given on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.markup import escape

from pipeline.cli.wizard.draft import Draft
from pipeline.errors import ConfigError, HubError, UserError, redact

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Question:
    """A question of the wizard.

    Attributes:
        name: name of the command-line option that answers it, without dashes.
        ask: the question in a few words.
        about: the meaning of the answer, in one line.
        default: the answer if the user presses Enter.
        take: checks an answer and puts it into the draft. If it raises UserError, the draft is unchanged.
        wanted: returns True if the answers so far make the question necessary.
        denies: name of the option that answers "no", if there is one.
    """

    name: str
    ask: str
    about: Callable[[Draft], str]
    default: Callable[[Draft], str]
    take: Callable[[Draft, str], None]
    wanted: Callable[[Draft], bool] = lambda draft: True
    denies: str | None = None

    def option(self, answer: str) -> str:
        """Return the command-line option that gives this answer."""
        return f"--{self.denies if self.denies and answer == 'no' else self.name}"

    @property
    def options(self) -> str:
        """Return the command-line options of this question, for messages."""
        return f"--{self.name}" + (f" or --{self.denies}" if self.denies else "")


class TokenRefused(HubError):
    """A refusal of what a person typed at a prompt for a token: the question is asked again, whoever answered it."""


class GoBack(Exception):
    """A request to ask an earlier question again."""

    def __init__(self, name: str):
        self.name = name


@dataclass
class Asker:
    """The loop that asks the questions.

    Attributes:
        draft: receives the answers, and has those of the command line.
        yes: take the default of everything else.
        answers: all answers so far, as text, without secrets.
    """

    console: Console
    draft: Draft
    yes: bool
    at_terminal: bool
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, str]:
        """Every known answer, also to questions that were not reached yet."""
        return self.draft.remembered | self.draft.given | self.answers

    def ask_all(self, questions: Sequence[Question]) -> None:
        """Ask the necessary questions in order.

        Raises:
            UserError: if an answer is wrong and nobody can be asked again.
            KeyboardInterrupt: if the user stops.
        """
        at = 0
        while at < len(questions):
            question = questions[at]
            at += 1
            try:
                if question.wanted(self.draft):
                    self.answers[question.name] = self._ask(question)
                elif question.name in self.draft.given:
                    option = question.option(self.draft.given[question.name])
                    raise ConfigError(f"{option}: does not apply to the other answers. Try: leave it out")
            except GoBack as back:
                at = next(i for i, q in enumerate(questions) if q.name == back.name)
                for name in (question.name, back.name):
                    for known in (self.answers, self.draft.remembered, self.draft.given):
                        known.pop(name, None)
            except UserError:
                self.draft.given.pop(question.name, None)  # a wrong answer is not saved
                raise

    def _ask(self, question: Question) -> str:
        """Ask until an answer is accepted, and return it."""
        draft = self.draft
        if question.name in draft.given:
            try:
                return self._take(question, draft.given[question.name])
            except TokenRefused as error:
                del draft.given[question.name]
                draft.remembered.pop(question.name, None)
                self._refuse(error)
        if question.name in draft.remembered:
            try:
                return self._take(question, draft.remembered[question.name])
            except UserError as error:
                if not self.at_terminal:
                    raise
                self._refuse(error)
        if self.yes:
            return self._take(question, question.default(draft))
        self.console.print(f"\n[dim]{escape(question.about(draft))}[/]")
        while True:
            try:
                return self._take(question, self._read(question, question.default(draft)))
            except UserError as error:
                if not self.at_terminal:
                    raise
                self._refuse(error)

    def _read(self, question: Question, default: str) -> str:
        self.console.print(f"[bold]{escape(question.ask)}[/] [cyan]{escape(f'[{default}]')}[/]: ", end="")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line and self.at_terminal:  # Ctrl-D
            raise KeyboardInterrupt
        if not line:
            ways = f"one more line, {question.options}, or --yes for the defaults"
            raise ConfigError(f"{question.ask}: no more answers in the input. Try: {ways}")
        answer = line.strip() or default
        if not self.at_terminal:  # show it in the output of a script
            self.console.print(escape(redact(answer)))
        return answer

    def _take(self, question: Question, answer: str) -> str:
        question.take(self.draft, answer)
        return answer

    def _refuse(self, error: UserError) -> None:
        self.console.print(f"[red]{escape(str(error).removeprefix('wizard: '))}[/]")


def answer_text(value: object) -> str:
    """Return a value as the answer that people type."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def yes_or_no(answer: str) -> bool:
    """Return True if the answer means yes.

    Raises:
        ConfigError: if it means neither yes nor no.
    """
    word = answer.strip().lower()
    if word in ("y", "yes", "true"):
        return True
    if word in ("n", "no", "false"):
        return False
    raise ConfigError(f"{answer!r}: neither yes nor no. Try: yes")


def one_of(answer: str, choices: Sequence[str]) -> str:
    """Return the choice that an answer names.

    Raises:
        ConfigError: if it names none of them.
    """
    word = answer.strip().lower().replace("-", "_")
    if word not in choices:
        raise ConfigError(f"{answer!r}: not a choice. Try: {', '.join(choices)}")
    return word
