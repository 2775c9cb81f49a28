"""The code in a card: found, and run as it stands, in a process and a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.system.process_environment import user_environment, with_own_package

_FENCE = re.compile(r"(`{3,})(\w*)\Z")


def blocks(card: str) -> list[str]:
    """The Python in a card, in its order; not what stands in a longer fence, as a model's answer does."""
    found, fence, language, lines = [], "", "", []
    for line in card.split("\n"):
        mark = _FENCE.match(line)
        if not fence and mark:
            (fence, language), lines = mark.groups(), []
        elif fence and mark and mark[1].startswith(fence) and not mark[2]:
            if language == "python":
                found.append("\n".join(lines))
            fence = ""
        else:
            lines.append(line)
    return found


def run(
    code: str, folder: Path, with_tunepress: bool = False, more: Mapping[str, str] | None = None, seconds: float = 3600
) -> subprocess.CompletedProcess:
    """Run `code` in `folder`, without a network, and without tunepress unless it needs that.

    Args:
        more: environment variables, which come last.

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
