"""The end of every command: one line and an exit code for user errors, a traceback for bugs."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from pipeline.errors import UserError, redact, redact_output


@contextlib.contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """Run a command, report its errors and remove tokens from all its output."""
    from pipeline.hub.retry import show_waits
    from pipeline.system.files import no_room

    out, err = _Redacted(sys.stdout, redact_output), _Redacted(sys.stderr, redact)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # Only a terminal shows the waits; elsewhere the line of an error stands alone.
        show_waits(lambda lines: print(*lines, sep="\n", file=sys.stderr) if sys.stderr.isatty() else None)
        try:
            yield
        except UserError as error:
            _end(program, error)
        except Exception as error:
            if full := no_room(error):
                _end(program, full)
            traceback.print_exc()
            sys.exit(1)


def _end(program: str, error: UserError) -> NoReturn:
    print(f"{program}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


class _Redacted:
    """A stream that removes tokens from everything written to it."""

    def __init__(self, stream: TextIO, hide: Callable[[str], str]):
        self._stream, self._hide = stream, hide

    def write(self, text: str) -> int:
        self._stream.write(self._hide(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
