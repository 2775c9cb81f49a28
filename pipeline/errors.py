"""Errors that people can act on, each in one line, and the redaction of secrets.

A `UserError` names the thing, the value and the way out; the command line prints
that line and exits with its code. Any other exception is a bug of ours and keeps
its traceback.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from urllib.parse import quote

LAUNCHED_BY = "TUNEPRESS_COMMAND"  # set by launch.sh; already quoted for a shell

# Tokens of the Hub and of its cousins, wherever they turn up.
_TOKEN_SHAPES = re.compile(
    r"(hf|api_org)_[A-Za-z0-9]{30,}|\b(hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|hf_(jwt|oauth)_[A-Za-z0-9._-]{8,})\b|(?<=write_token=)[^&\s\"'\\]+"
)
# What stands before a secret, and stays: in an address, and in a header.
_BEFORE_SECRETS = re.compile(
    r"(://)[^\s/@\"'\\]+(?=@)|([?&](?:\w*token|api_?key|password|secret|sig|[\w-]*signature)=)[^&\s\"'#\\]+"
    r"|(\bbearer\s+)[\w.~+/=-]{8,}",
    re.IGNORECASE,
)
# No folder and no model is called so; `redact` hides more than this, where nothing depends on it.
_SURELY_SECRET = re.compile(
    r"\b((hf|api_org)_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{20,}|hf_(jwt|oauth)_[\w.-]{20,})"
    r"|(?<=://)[^\s/@\"'\\]+(?=@)|(?<=[?&])\w*(token|api_?key|password|secret)=[^&\s\"'#\\]{4,}",
    re.ASCII,
)
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "TRACKIO_WRITE_TOKEN")
LONGEST = 2000  # characters of an error's line, which may repeat a name of any length


class UserError(Exception):
    """Something that the person at the keyboard can fix. `str(error)` is one line."""

    exit_code = 2

    def __init__(self, message: str):
        line = printable(redact(" ".join(message.split())))
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class ConfigError(UserError):
    """The configuration file, or a `--set`, does not say something that can be run."""


class DataError(UserError):
    """The data set is missing, empty or malformed."""


class ModelError(UserError):
    """The model cannot be found, read, or handled."""


class CheckpointError(UserError):
    """A safetensors file or its index is not what it says it is."""


class QuantizationError(UserError):
    """A weight cannot be stored the way that was asked for."""


class GateError(UserError):
    """A variant is not as near to the model in full precision as it has to be."""


class HubError(UserError):
    """The Hub refused, or could not be reached."""


class TrackError(UserError):
    """A tracker refused, or could not be reached."""


class WorkspaceError(UserError):
    """The run's folder is in use, or not a run's folder."""


class DiskFull(UserError):
    """There is no room for what was to be written."""


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs a package that is not installed; run: {install(f'tunepress[{extra}]')}")


class Interrupted(UserError):
    """Ctrl-C or SIGTERM came; what was running has ended."""

    exit_code = 130

    def __init__(self):
        super().__init__("stopped; run the same command again to go on from there")


class StageFailed(UserError):
    """A stage ended without finishing. Exit code 2 where the user can mend it; else the log is named."""

    def __init__(self, message: str, exit_code: int, log: object):
        super().__init__(message if exit_code == 2 else f"{message} (log: {log})")
        self.exit_code = exit_code


def install(*words: str) -> str:
    """Return the pip command that installs packages into this environment."""
    pip = f"{shlex.quote(sys.executable)} -m pip" if LAUNCHED_BY in os.environ else "pip"
    return " ".join([pip, "install", *(shlex.quote(word) for word in words)])


def is_unreachable(error: BaseException) -> bool:
    """Did a server not answer? The Hub client's transport changes between its versions, so by module."""
    transports = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return type(error).__module__.split(".")[0] in transports or isinstance(error, (ConnectionError, TimeoutError))


def redact(text: str) -> str:
    """`text` without any token: neither those in the environment nor anything shaped like one."""
    text = _without_known(text, shortest=4)
    text = _BEFORE_SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3]}***", text)
    return _TOKEN_SHAPES.sub("***", text)


def redact_output(text: str) -> str:
    """`text` without what is surely a token; names in it that look a little like one stay, for programs may read it."""
    return _SURELY_SECRET.sub("***", _without_known(text, shortest=12))


def holds_secret(text: str) -> bool:
    """Is there a token in a text that may as well be a name, and is not to be refused for looking a little like one?"""
    return any(secret in text for secret in _secrets(shortest=12)) or bool(_SURELY_SECRET.search(text))


def printable(text: str) -> str:
    """`text` with escapes in place of what a terminal would obey, or could not show."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _without_known(text: str, shortest: int) -> str:
    for secret in _secrets(shortest):
        for written in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1]):
            text = text.replace(written, "***")
    return text


def _secrets(shortest: int) -> list[str]:
    known = (os.environ.get(name, "").strip() for name in _SECRET_VARIABLES)
    return [secret for secret in known if len(secret) >= shortest]
