"""The commands that users type: `tunepress`, or the launch.sh by which they started it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from pipeline.errors import LAUNCHED_BY


def command(*words: object) -> str:
    """Return a tunepress command as users type it here."""
    return " ".join([os.environ.get(LAUNCHED_BY, "tunepress"), *(shlex.quote(str(word)) for word in words)])


def other_token() -> str:
    """Return the way to another Hub token: the variable is used instead of a login."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return f"set HF_TOKEN to another token; it is used instead of a login (or unset it, then {login()})"
    return login()


def login() -> str:
    """Return the command that stores a Hub token. With launch.sh, `hf` is in .venv and not on the user's PATH."""
    hf = shlex.quote(str(Path(sys.executable).with_name("hf"))) if LAUNCHED_BY in os.environ else "hf"
    return f"{hf} auth login"
