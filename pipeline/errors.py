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

# Tokens of the Hub and of similar services.
_TOKEN_SHAPES = re.compile(
    r"(hf|api_org)_[A-Za-z0-9]{30,}|\b(hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|hf_(jwt|oauth)_[A-Za-z0-9._-]{8,})\b"
)
# What stands before a secret, and stays: in an address, in a header, and as a name.
_BEFORE_SECRETS = re.compile(
    r"(://)[^\s/@\"'\\]+(?=@)|([?&](?:\w*token|api_?key|password|secret|sig|[\w-]*signature)=)[^&\s\"'#\\]+"
    r"|(\bbearer\s+|authorization\W{1,4}basic\s+)[\w.~+/=-]{8,}"
    r"|((?:write_token|access_token|api_?key|password)(?:=|\\?[\"']?: ?\\?[\"']))[^&\s\"'\\]+",
    re.IGNORECASE,
)
# The end of a text that may be the beginning of such a secret, or of what stands before it.
_BEGINNINGS = ("hf_", "api_org_", "bearer ", "authorization", "write_token", "access_token", "api_key", "password")
_BEGUN = "|".join(re.escape(word[:end]) for word in _BEGINNINGS for end in range(1, len(word)))
_UNFINISHED = re.compile(
    r"((hf|api_org)_[\w.-]*|://[^\s/@\"'\\]*|:/?|[?&][\w-]*(=[^&\s\"'#\\]*)?"
    r"|(\bbearer|authorization\W{1,4}basic)\s+[\w.~+/=-]*|authorization\W{0,4}\w*"
    r"|(write_token|access_token|api_?key|password)(=|\\?[\"']?:? ?\\?[\"']?)[^&\s\"'\\]*"
    rf"|\b({_BEGUN}))\Z",
    re.IGNORECASE,
)
# No folder and no model is called so; `redact` hides more than this, where nothing depends on it.
_SURELY_SECRET = re.compile(
    r"\b((hf|api_org)_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{20,}|hf_(jwt|oauth)_[\w.-]{20,})"
    r"|(?<=://)[^\s/@\"'\\]+(?=@)|(?<=[?&])\w*(token|api_?key|password|secret)=[^&\s\"'#\\]{4,}",
    re.ASCII,
)
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "TRACKIO_WRITE_TOKEN")
# Variables of other programs. Their values are hidden too, unless they are short or paths of files.
_SECRET_NAMES = re.compile(r".*(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)")
_LONGER_THAN_WORDS = 16
LONGEST_SECRET = 4096  # characters
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
    return " ".join(shlex.quote(word) for word in (sys.executable, "-m", "pip", "install", *words))


def is_unreachable(error: BaseException) -> bool:
    """Did a server not answer? The Hub client's transport changes between its versions, so by module."""
    transports = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return type(error).__module__.split(".")[0] in transports or isinstance(error, (ConnectionError, TimeoutError))


def redact(text: str) -> str:
    """Return a text without secrets: neither those in the environment, nor anything of the shape of a token."""
    text = _without_known(text, shortest=4)
    text = _BEFORE_SECRETS.sub(lambda found: f"{found[1] or found[2] or found[3] or found[4]}***", text)
    return _TOKEN_SHAPES.sub("***", text)


def redact_output(text: str) -> str:
    """Return a text without what is surely a secret; names that look a little like one stay, for programs read them."""
    return _SURELY_SECRET.sub("***", _without_known(text, shortest=12))


def unfinished_secret(text: str) -> int:
    """Return the position from which the end of a text may be the beginning of a secret; else the text's length."""
    first = max(0, len(text) - LONGEST_SECRET)
    found = _UNFINISHED.search(text, first)
    position, known = found.start() if found else len(text), _written(shortest=4)
    for written in known:
        for length in range(min(len(written) - 1, len(text)), 0, -1):
            if text.endswith(written[:length]):
                position = min(position, len(text) - length)
                break
    while (start := _cut_at(text, position, known)) is not None:  # no secret is cut in two
        position = start
    return position


def _cut_at(text: str, position: int, known: list[str]) -> int | None:
    """Return the start of a known secret that lies on both sides of a position; None if there is none."""
    for written in known:
        start = text.find(written, max(0, position - len(written) + 1), position + len(written) - 1)
        if start >= 0:
            return start
    return None


def is_secret_variable(name: str) -> bool:
    """Return True if an environment variable of this name holds a secret."""
    return name in _SECRET_VARIABLES or bool(_SECRET_NAMES.fullmatch(name))


def holds_secret(text: str) -> bool:
    """Return True if there is a secret in a text that may also be a name, and may look a little like a token."""
    return any(secret in text for secret in _secrets(shortest=12)) or bool(_SURELY_SECRET.search(text))


def printable(text: str) -> str:
    """`text` with escapes in place of what a terminal would obey, or could not show."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _without_known(text: str, shortest: int) -> str:
    for written in _written(shortest):
        text = text.replace(written, "***")
    return text


def _written(shortest: int) -> list[str]:
    """Return every form in which a known secret may stand in a text; the longest first."""
    forms = set()
    for secret in _secrets(shortest):
        forms |= {secret, quote(secret, safe=""), repr(secret)[1:-1]}
        forms |= {json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
    return sorted(forms, key=len, reverse=True)


def _secrets(shortest: int) -> list[str]:
    found = [secret for name in _SECRET_VARIABLES if len(secret := os.environ.get(name, "").strip()) >= shortest]
    others = [value.strip() for name, value in os.environ.items() if is_secret_variable(name)]
    return found + [other for other in others if len(other) >= _LONGER_THAN_WORDS and other[0] not in "/~."]
