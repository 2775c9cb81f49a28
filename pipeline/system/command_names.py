"""What people type: `tunepress`, or the launch.sh by which they came, whose environment no shell of theirs has."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from pipeline.errors import LAUNCHED_BY


def command(*words: object) -> str:
    """A command of ours as people type it here."""
    return " ".join([os.environ.get(LAUNCHED_BY, "tunepress"), *(shlex.quote(str(word)) for word in words)])


def login() -> str:
    """The Hub's own command that keeps a token, which .venv has and the PATH of people who use launch.sh has not."""
    hf = shlex.quote(str(Path(sys.executable).with_name("hf"))) if LAUNCHED_BY in os.environ else "hf"
    return f"{hf} auth login"
