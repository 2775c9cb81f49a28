"""Redaction of what is private: paths of this machine, and tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import redact


def file_name(path: str) -> str:
    """Return the last readable part of a path."""
    return next((part for part in reversed(Path(path).parts) if any(c.isprintable() and c != " " for c in part)), path)


def without_private(content: Any, run: Path) -> Any:
    """Return plain data without tokens; reasons of failures name the run's folder alone, and the home as `~`.

    The data may hold answers of a model, which can have learned a token from its data.
    """
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, list):
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
