"""The end of every command: one line and an exit code for user errors, a traceback for bugs."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from pipeline.errors import UserError, redact, redact_output
from pipeline.system.redaction import Redactor


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
        finally:
            out.end()
            err.end()


def _end(program: str, error: UserError) -> NoReturn:
    print(f"{program}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


class _Redacted(io.TextIOBase):
    """A stream that removes tokens from everything written to it, in whatever pieces."""

    def __init__(self, stream: TextIO, hide: Callable[[str], str]):
        self._stream, self._redactor = stream, Redactor(hide)

    def write(self, text: str) -> int:
        self._stream.write(self._redactor.feed(text))
        return len(text)

    def end(self) -> None:
        """Write what was kept back; a secret may have been cut there."""
        if rest := self._redactor.end():
            self._stream.write(rest)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    @property
    def buffer(self) -> _RedactedBytes:
        return _RedactedBytes(self)


class _RedactedBytes(io.RawIOBase):
    """The binary side of such a stream."""

    def __init__(self, text: _Redacted):
        self._text = text

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._text.write(content.decode("utf-8", "replace"))
        return len(content)

    def flush(self) -> None:
        self._text.flush()
