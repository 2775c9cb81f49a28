"""The findings about a release, one line each, and their sum."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from pipeline.errors import redact
from pipeline.publishing.cards.markdown import one_line

DEFECTS_FOUND = 3  # the exit code; 1 and 2 are those of every verb
LONGEST = 600  # characters of a line; what a hostile release says is cut off


class Verdict(StrEnum):
    """`unknown` is what could not be looked at here, which speaks neither for the release nor against it."""

    right = "ok"
    wrong = "defect"
    outdated = "outdated"
    unknown = "not checked"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at: lineage, files, figures, card, measured, snippets.
        subject: of what: a path in the release, or a model.
        message: for people; of a release that may be hostile, so without anything that a terminal would obey.
    """

    check: str
    subject: str
    verdict: Verdict
    message: str

    def __post_init__(self):
        for name in ("subject", "message"):
            text = redact(one_line(getattr(self, name)))
            object.__setattr__(self, name, text if len(text) <= LONGEST else f"{text[:LONGEST]}...")


@dataclass(frozen=True)
class Verification:
    """A release, and all that was found about it.

    Attributes:
        release: the repository or the folder, as it was asked for.
        revision: the commit of a repository.
    """

    release: str
    revision: str | None
    findings: tuple[Finding, ...]

    @property
    def defects(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.verdict in (Verdict.wrong, Verdict.outdated))

    @property
    def exit_code(self) -> int:
        return DEFECTS_FOUND if self.defects else 0

    def to_dict(self) -> dict:
        found = [asdict(finding) for finding in self.findings]
        return {
            "release": self.release,
            "revision": self.revision,
            "defects": len(self.defects),
            "findings": found,
            "exit_code": self.exit_code,
        }


def right(check: str, subject: str, message: str) -> Finding:
    return Finding(check, subject, Verdict.right, message)


def wrong(check: str, subject: str, message: str) -> Finding:
    return Finding(check, subject, Verdict.wrong, message)


def outdated(check: str, subject: str, message: str) -> Finding:
    return Finding(check, subject, Verdict.outdated, message)


def unknown(check: str, subject: str, message: str) -> Finding:
    return Finding(check, subject, Verdict.unknown, message)
