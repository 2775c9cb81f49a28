"""The findings about a release, one line each, and the result of all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from pipeline.errors import redact
from pipeline.publishing.cards.markdown import one_line

DEFECTS_FOUND = 3  # the exit code; 1 and 2 are those of every verb
LONGEST = 600  # characters of a line; a hostile release may write more


class Verdict(StrEnum):
    """The verdict of a finding. `unknown` stands for a check that is not possible here."""

    right = "ok"
    wrong = "defect"
    outdated = "outdated"
    unknown = "not checked"


@dataclass(frozen=True)
class Finding:
    """The result of one check, shown as one line.

    Attributes:
        check: lineage, files, figures, card, measured or snippets.
        subject: a path in the release, or a model.
        message: text for people, without characters that a terminal would obey.
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
    """A release and all findings about it.

    Attributes:
        release: the repository or the folder, as the user named it.
        revision: the commit of a repository.
    """

    release: str
    revision: str | None
    findings: tuple[Finding, ...]

    @property
    def defects(self) -> tuple[Finding, ...]:
        """Return the findings that speak against the release."""
        return tuple(f for f in self.findings if f.verdict in (Verdict.wrong, Verdict.outdated))

    @property
    def exit_code(self) -> int:
        """Return the exit code of `tunepress verify`."""
        return DEFECTS_FOUND if self.defects else 0

    def to_dict(self) -> dict:
        """Return the content of `tunepress verify --json`."""
        found = [asdict(finding) for finding in self.findings]
        return {
            "release": self.release,
            "revision": self.revision,
            "defects": len(self.defects),
            "findings": found,
            "exit_code": self.exit_code,
        }


def right(check: str, subject: str, message: str) -> Finding:
    """Return a finding that speaks for the release."""
    return Finding(check, subject, Verdict.right, message)


def wrong(check: str, subject: str, message: str) -> Finding:
    """Return a defect."""
    return Finding(check, subject, Verdict.wrong, message)


def outdated(check: str, subject: str, message: str) -> Finding:
    """Return a finding about a model that needs other versions of the libraries."""
    return Finding(check, subject, Verdict.outdated, message)


def unknown(check: str, subject: str, message: str) -> Finding:
    """Return a finding about a check that is not possible here."""
    return Finding(check, subject, Verdict.unknown, message)
