"""The allowed names of repositories, runs, licenses and packaged models."""

from __future__ import annotations

import re

# The rules of the Hub: no "--" and "..", no ".git" at the end, and no mark at the beginning or end of a name.
_REPO_PART = r"[A-Za-z0-9]([\w.-]{0,94}\w)?"
REPO_ID = re.compile(rf"(?!.*(--|\.\.|\.git\Z)){_REPO_PART}/{_REPO_PART}\Z", re.ASCII)
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}\Z")
PACKAGE_SOURCE = re.compile(r"package:([A-Za-z_]\w*)/([\w.-]+\.gguf)\Z", re.ASCII)


def repository_id(value: str | None) -> str | None:
    """Return `value` if the Hub accepts it as the name of a repository.

    Raises:
        ValueError: with the rules for names.
    """
    if value is not None and not REPO_ID.match(value):
        raise ValueError("a repository is written USER/NAME, with letters, digits, '-', '_' and '.'")
    return value


def run_name(value: str) -> str:
    """Return `value` if a run can have this name.

    Raises:
        ValueError: with the rules for names.
    """
    if not RUN_NAME.match(value):
        raise ValueError("a run's name has letters, digits, '.', '_' and '-', and no spaces")
    return value
