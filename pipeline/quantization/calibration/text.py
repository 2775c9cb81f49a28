"""Calibration text as windows of tokens, and a check that nothing is measured on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipeline.data.encode import NO_LOSS, Encoded
from pipeline.errors import DataError

WINDOW = 512  # tokens
COMPARED = 24  # tokens that count, in a row; so many are no coincidence. The shortest window has 31


def windows_of(sequences: Iterable[Encoded], tokens: int, window: int) -> list[list[int]]:
    """Return consecutive windows of whole length over sequences that follow each other.

    Args:
        tokens: of all windows together, at most.
        window: tokens of each.

    Raises:
        DataError: if there is not enough text for one window.
    """
    found: list[list[int]] = []
    rest: list[int] = []
    for sequence in sequences:
        rest += sequence.input_ids
        while len(rest) >= window and (len(found) + 1) * window <= tokens:
            found.append(rest[:window])
            rest = rest[window:]
        if (len(found) + 1) * window > tokens:
            break
    if not found:
        raise DataError(
            f"quantize.calibration: the text has {len(rest)} tokens, and one window has {window}. "
            "Try: more text in quantize.calibration.source, or quantize.quality=fast"
        )
    return found


def check_apart(calibration: Sequence[Encoded], measured: Iterable[Encoded], name: str) -> None:
    """Raise an error if a text is both calibrated and measured on.

    Args:
        calibration: the sequences of the calibration text.
        measured: the sequences of a text that is measured on.
        name: of that text, for the error.

    Raises:
        DataError: if they share 24 learned or measured tokens in a row.
    """
    if len(without_shared(calibration, measured)) < len(calibration):
        raise DataError(
            f"quantize.calibration: its text contains a part of the {name} text, which is measured on. "
            "Try: another quantize.calibration.source"
        )


def without_shared(calibration: Sequence[Encoded], measured: Iterable[Encoded]) -> list[Encoded]:
    """Return the sequences that share no 24 learned or measured tokens in a row with a text that is measured on."""
    known = {run for sequence in measured for run in _runs(sequence)}
    return [sequence for sequence in calibration if known.isdisjoint(_runs(sequence))]


def _runs(sequence: Encoded) -> Iterator[int]:
    """Yield a hash of every run of counted tokens."""
    counted = [token for token, label in zip(sequence.input_ids, sequence.labels, strict=True) if label != NO_LOSS]
    for first in range(len(counted) - COMPARED + 1):
        yield hash(tuple(counted[first : first + COMPARED]))
