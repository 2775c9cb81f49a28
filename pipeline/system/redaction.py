"""Redaction of what is private: paths of this machine, and tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import LONGEST_SECRET, redact, unfinished_secret


class Redactor:
    """Redaction of text that comes in pieces: a secret that is cut by two of them is hidden whole."""

    def __init__(self, hide: Callable[[str], str] = redact):
        self._hide, self._held = hide, ""

    def feed(self, text: str) -> str:
        """Return the next text without secrets. An end that may be the beginning of a secret is kept back."""
        text = self._held + text
        end = unfinished_secret(text)
        if len(text) - end >= LONGEST_SECRET:  # this is no secret
            end = len(text)
        self._held = text[end:]
        return self._hide(text[:end])

    def end(self) -> str:
        """Return what was kept back, without secrets."""
        rest, self._held = self._hide(self._held), ""
        return rest


def file_name(path: str) -> str:
    """Return the last readable part of a path."""
    return next((part for part in reversed(Path(path).parts) if any(c.isprintable() and c != " " for c in part)), path)


def without_private(content: Any, run: Path) -> Any:
    """Return plain data without tokens; reasons of failures name the run's folder alone, and the home as `~`.

    The data may hold answers of a model, which can have learned a token from its data.
    """
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, (list, tuple)):
        return [without_private(value, run) for value in content]
    if not isinstance(content, dict):
        return content
    told = {key: without_private(value, run) for key, value in content.items()}
    if isinstance(told.get("reason"), str):
        told["reason"] = _shorten(told["reason"], run)
    return told


def _shorten(text: str, run: Path) -> str:
    names = {str(run.resolve()): run.resolve().name, str(run.absolute()): run.absolute().name, str(Path.home()): "~"}
    for folder, name in names.items():
        if len(folder) > 1:
            text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])", name.replace("\\", r"\\"), text)
    return text
