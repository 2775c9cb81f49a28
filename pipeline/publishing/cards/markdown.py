"""Formats for figures, and escaping for other people's texts, in markdown.

A figure that was not measured (missing, null, not finite) becomes None. Names, prompts and answers come from data
sets and models; escaped, they can be nothing but text.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

_UNWANTED = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")  # controls, text direction
_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&vert;", **{c: f"\\{c}" for c in "\\`*_[]~$@:#"}}
)


SMALLEST, SMALL = 1e-4, 1e-2  # a figure below the first is as good as zero; one below the second if its error is larger


class Markdown(str):
    """Text that is markdown already and is not escaped again."""


def only_formatted(value: object) -> Markdown:
    """Return markdown unchanged, and other text escaped. A template prints nothing else.

    Raises:
        TypeError: if `value` is missing, or a number without a format.
    """
    if isinstance(value, str):
        return value if isinstance(value, Markdown) else escape(value)
    raise TypeError(f"{value!r}: printed in a card without a format")


@functools.cache
def environment(folder: Path) -> Environment:
    """Return the environment of templates: its filters are our formats, and it prints through `only_formatted`.

    A missing value is false in a condition, and an error when printed.
    """
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    made = Environment(
        loader=FileSystemLoader(folder),
        undefined=ChainableUndefined,
        finalize=only_formatted,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (
        aim,
        code,
        count,
        decimal,
        duration,
        estimate,
        fence,
        listed,
        options,
        paragraphs,
        parameters,
        plain,
        python_literal,
        said,
    )
    made.filters |= {form.__name__: form for form in (*formats, share, shell_word, size, unit)}
    made.globals["table"] = table
    return made


def one_line(text: object) -> str:
    """Return `text` without control characters, line breaks, HTML comments and broken characters."""
    return " ".join(_clean(text).split())


def escape(text: object) -> Markdown:
    """Return `text` escaped for a paragraph or a cell. It must not be the start of a line."""
    return Markdown(one_line(text).translate(_ESCAPES).replace("www.", "www\\."))


def paragraphs(text: object) -> Markdown:
    """Return `text` as escaped paragraphs, which empty lines separate. None begins a list or a heading."""
    parts = (escape(part) for part in re.split(r"\r?\n[ \t]*\r?\n", str(text)))
    return Markdown("\n\n".join(re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", part) for part in parts if part))


def code(text: object) -> Markdown:
    """Return `text` as inline code."""
    text = one_line(text)
    fence = fence_marks(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{fence}{space}{text}{space}{fence}" if text else "")


def fence(text: object, length: int) -> Markdown:
    """Return `text`, cut to `length` characters, as a code block that it cannot close."""
    text = _clean(text).replace("\r\n", "\n").replace("\r", "\n").strip()
    if len(text) > length:
        text = text[:length].rstrip() + " …"
    marks = fence_marks(text)
    return Markdown(f"{marks}text\n{text}\n{marks}")


def fence_marks(text: str, least: int = 3) -> str:
    """Return the shortest fence that `text` cannot close, of `least` marks or more."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def python_literal(text: object) -> Markdown:
    """Return `text` as a string literal of Python, for a code block."""
    literal = repr(str(text)).replace("<!--", r"\x3c!--")
    return Markdown(literal if set("\"'") & set(literal[1:-1]) else f'"{literal[1:-1]}"')


def shell_word(text: object) -> Markdown:
    """Return `text` as one word of a shell, for a code block."""
    text = str(text)
    if text.isprintable() and "<!--" not in text and "`" not in text:
        return Markdown(shlex.quote(text))
    escaped = repr(f'"{text}')[2:-1]  # with the double quote, repr has single ones around it
    return Markdown("$'" + escaped.replace("<!--", r"\x3c!--") + "'")


def listed(values: Iterable[object], between: str = ", ") -> Markdown:
    """Return the known ones of several values, joined."""
    return Markdown(between.join(only_formatted(value) for value in values if value))


def unit(value: Markdown | None, words: str) -> Markdown | None:
    """Return a formatted figure with its unit; None stays None."""
    return None if value is None else Markdown(f"{value} {words}")


def said(words: str, *values: object) -> Markdown | None:
    """Return `words` with values in their places; None if a value is not known."""
    return Markdown(words.format(*map(only_formatted, values))) if all(values) else None


def table(headers: Sequence[str], rows: Sequence[Sequence[str | None]], align: str = "---:") -> Markdown:
    """Return a table without its empty rows and columns; an empty text if nothing is left.

    Args:
        headers: markdown.
        rows: cells of markdown, text or None.
        align: alignment of all columns except the first.
    """
    rows = [[only_formatted(cell) if cell else None for cell in row] for row in rows if any(row[1:])]
    keep = [0, *(i for i in range(1, len(headers)) if any(row[i] for row in rows))]
    if not rows:
        return Markdown("")
    lines = [[headers[i] for i in keep], [":---", *[align] * (len(keep) - 1)]]
    lines += [[re.sub(r"(?<!\\)\|", r"\\|", row[i] or "") for i in keep] for row in rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def number(value: object) -> float | int | None:
    """Return `value` if it is a finite number, else None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def rounded(measured: object, scale: float = 1) -> tuple[float, float | None, int] | None:
    """Return (value, standard error, decimals): decimals that show two digits of the error, or four of the value.

    Args:
        measured: an `Estimate`, or anything else that has a value and a standard error.
    """
    known = number(getattr(measured, "value", None))
    if known is None:
        return None
    value, error = known * scale, (number(getattr(measured, "stderr", None)) or 0) * scale
    return value, error or None, _decimals(error, 2) if error else _decimals(value, 4)


def estimate(measured: object, percent: bool = False, sign: str = "") -> Markdown | None:
    """Return a value and its standard error: `Estimate(12.3456, 0.05123)` -> 12.346 ± 0.051.

    A small figure that cannot be told from zero is a bound instead: `Estimate(0.00002, 0.00004)` -> < 0.0001. The bound
    is two errors above the figure, in one digit.
    """
    found = rounded(measured, 100 if percent else 1)
    if found is None:
        return None
    value, error, decimals = found
    bound = abs(value) + 2 * (error or 0)
    if value and (bound < SMALLEST or (abs(value) < (error or 0) and bound < SMALL)):
        return _unbroken(f"< {_one_digit_above(max(bound, SMALLEST))}" + (" %" if percent else ""))
    shown = f"{value:{sign},.{decimals}f}" + (f" ± {error:,.{decimals}f}" if error else "") + (" %" if percent else "")
    return _unbroken(shown)


def _one_digit_above(value: float) -> str:
    """Return the next number of one digit that is not below a positive value: 0.0341 -> 0.04."""
    decimals = _decimals(value, 1)
    return f"{math.ceil(round(value * 10**decimals, 6)) / 10**decimals:.{decimals}f}"


def count(value: object) -> Markdown | None:
    """Format a count: 12345 -> 12,345."""
    return None if (known := number(value)) is None else Markdown(f"{int(known):,}")


def decimal(value: object) -> Markdown | None:
    """Format a figure with three digits: 12.345 -> 12.3."""
    known = number(value)
    return None if known is None else Markdown(f"{known:,.{_decimals(known, 3)}f}".replace("-", "−"))


def plain(value: object) -> Markdown | None:
    """Format a setting as it was written: 0.0002 -> 0.0002, 32.0 -> 32."""
    return None if number(value) is None else Markdown(f"{value:.10g}")


def options(values: object) -> Markdown | None:
    """Format settings that were passed on to a library: `{"beta": 0.1}` -> `beta: 0.1`. Nothing gives None."""
    if not isinstance(values, Mapping) or not values:
        return None
    return Markdown(", ".join(code(f"{name}: {json.dumps(value, default=str)}") for name, value in values.items()))


def share(value: object) -> Markdown | None:
    """Format a share: 0.457 -> 46 %."""
    known = number(value)
    return None if known is None else _unbroken(f"{100 * known:,.{_decimals(100 * known, 2)}f} %")


def percent(value: object) -> Markdown | None:
    """Format a share as it was set: 0.05 -> 5 %."""
    return None if (known := number(value)) is None else _unbroken(f"{100 * known:.10g} %")


def aim(value: object, key: str) -> Markdown | None:
    """Format a target by its key: 0.03 and `rise` -> 3 % more perplexity."""
    if key == "rise":
        return unit(percent(value), "more perplexity")
    return unit(plain(value), {"size_mb": "MB", "bits": "bits a weight"}.get(key, ""))


def size(value: object) -> Markdown | None:
    """Format bytes in decimal units: 123456789 -> 123 MB."""
    return _in_units(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")))


def parameters(value: object) -> Markdown | None:
    """Format a number of parameters: 134515008 -> 135 million."""
    return _in_units(value, ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")))


def duration(seconds: object) -> Markdown | None:
    """Format a time in seconds: 213.3 -> 3.56 minutes."""
    return _in_units(seconds, ((3600, "hours"), (60, "minutes"), (1, "seconds")))


def _in_units(value: object, units: Sequence[tuple[float, str]]) -> Markdown | None:
    if (known := number(value)) is None:
        return None
    factor, unit = next((u for u in units if known >= u[0]), units[-1])
    return _unbroken(f"{decimal(known / factor)} {unit}")


def _unbroken(figure: str) -> Markdown:
    """Return a figure that stays on one line, with a minus as wide as a plus."""
    return Markdown(figure.replace(" ", "\u00a0").replace("-", "−"))


def _decimals(value: float, digits: int) -> int:
    """Return the number of decimals that show `digits` digits of `value`."""
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 12) if value else 0


def _clean(text: object) -> str:
    text = str(text).encode("utf-8", "replace").decode("utf-8")
    return _UNWANTED.sub("", text).replace("<!--", "<! --")
