"""Numbers as people write them."""

from __future__ import annotations


def size(count: float) -> str:
    """Return a number of bytes with its unit, such as `164 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def clock(seconds: float) -> str:
    """Return a time with its unit, such as `4.2s` or `3m07s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
