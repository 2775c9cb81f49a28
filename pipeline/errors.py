"""Errors that people can act on, each in one line, and the redaction of secrets.

A `UserError` names the thing, the value and the way out; the command line prints
that line and exits with its code. Any other exception is a bug of ours and keeps
its traceback.
"""

from __future__ import annotations

import os
import re

from pipeline.commands import install

# Tokens of the Hub and of its cousins, wherever they turn up.
_TOKEN_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|hf_(jwt|oauth)_[A-Za-z0-9._-]{8,})\b|(?<=write_token=)[^&\s\"']+"
)
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "TRACKIO_WRITE_TOKEN")


class UserError(Exception):
    """Something that the person at the keyboard can fix. `str(error)` is one line."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(redact(" ".join(message.split())))


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


def is_unreachable(error: BaseException) -> bool:
    """Did a server not answer? The Hub client's transport changes between its versions, so by module."""
    transports = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return type(error).__module__.split(".")[0] in transports or isinstance(error, (ConnectionError, TimeoutError))


def redact(text: str) -> str:
    """`text` without any token: neither those in the environment nor anything shaped like one."""
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    return _TOKEN_SHAPES.sub("***", text)
