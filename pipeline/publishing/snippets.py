"""The code blocks of a card, and a separate process that runs one unchanged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from markdown_it import MarkdownIt

from pipeline.system.process_environment import user_environment, with_own_package


def blocks(card: str) -> list[str]:
    """Return the Python code blocks of a card in order, without those inside another block, such as an answer."""
    fences = (token for token in MarkdownIt().parse(card) if token.type == "fence" and token.info == "python")
    return [fence.content.removesuffix("\n") for fence in fences]


def run(
    code: str, folder: Path, with_tunepress: bool = False, more: Mapping[str, str] | None = None, seconds: float = 3600
) -> subprocess.CompletedProcess:
    """Run `code` in `folder` without a network. It can import tunepress only with `with_tunepress`.

    Args:
        more: environment variables that override all others.

    Raises:
        subprocess.TimeoutExpired: after `seconds`.
    """
    script = folder / "snippet.py"
    script.write_text(code, encoding="utf-8")
    plain = (
        {k: v for k, v in user_environment().items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"} | dict(more or {})
    )
    return subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=with_own_package(plain) if with_tunepress else plain,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
