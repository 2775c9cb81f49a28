"""What people type: `tunepress`, or the launch.sh by which they came, whose environment no shell of theirs has."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

LAUNCHED_BY = "TUNEPRESS_COMMAND"  # set by launch.sh; already as a shell takes it


def command(*words: object) -> str:
    """A command of ours as people type it here."""
    return " ".join([os.environ.get(LAUNCHED_BY, "tunepress"), *(shlex.quote(str(word)) for word in words)])


def login() -> str:
    """The Hub's own command that keeps a token, which .venv has and the PATH of people who use launch.sh has not."""
    hf = shlex.quote(str(Path(sys.executable).with_name("hf"))) if LAUNCHED_BY in os.environ else "hf"
    return f"{hf} auth login"


def install(*words: str) -> str:
    """The pip command that installs into the environment that this runs in."""
    pip = f"{shlex.quote(sys.executable)} -m pip" if LAUNCHED_BY in os.environ else "pip"
    return " ".join([pip, "install", *(shlex.quote(word) for word in words)])
