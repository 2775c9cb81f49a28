"""Checks of values in a model's configuration, for settings that `architectures` knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]

MAX_WIDTH = 1 << 24  # beyond it a configuration is left to transformers
KINDS = ("full_attention", "sliding_attention")


def is_whole(value: Any) -> bool:
    """Return True for a whole number from 0."""
    return type(value) is int and value >= 0


def is_width(value: Any) -> bool:
    """Return True for a whole number from 1 to `MAX_WIDTH`."""
    return type(value) is int and 0 < value <= MAX_WIDTH


def is_number(value: Any) -> bool:
    """Return True for a finite fraction above 0."""
    return type(value) is float and math.isfinite(value) and value > 0


def is_number_or_whole(value: Any) -> bool:
    """Return True for a finite fraction above 0, or a width."""
    return is_number(value) or is_width(value)


def is_share(value: Any) -> bool:
    """Return True for a fraction from 0 to below 1."""
    return type(value) is float and 0 <= value < 1


def is_part(value: Any) -> bool:
    """Return True for a fraction above 0 and up to 1."""
    return is_number(value) and value <= 1


def is_flag(value: Any) -> bool:
    """Return True for a boolean."""
    return type(value) is bool


def is_text(value: Any) -> bool:
    """Return True for a text."""
    return type(value) is str


def is_token(value: Any) -> bool:
    """Return True for the number of a token, or None."""
    return value is None or is_whole(value)


def are(check: Check) -> Check:
    """Return the check of a list whose values all pass `check`."""
    return lambda value: type(value) is list and all(map(check, value))


def one_of(*allowed: Any) -> Check:
    """Return the check of a value that equals one of `allowed`, in its type too."""
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def or_none(check: Check) -> Check:
    """Return the check of a value that is None or passes `check`."""
    return lambda value: value is None or check(value)


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def is_rope(value: Any) -> bool:
    """Return True for rotary parameters in a form that every architecture here takes."""
    if type(value) is not dict:
        return False
    kinds = [value[key] for key in ("rope_type", "type") if key in value]
    kind = kinds[0] if kinds and all(one_of(*_ROPE_KEYS)(k) and k == kinds[0] for k in kinds) else None
    if kind is None:
        return False
    numbers = {key: number for key, number in value.items() if key not in ("rope_type", "type")}
    return (
        set(_ROPE_KEYS[kind]) <= numbers.keys() <= {*_ROPE_KEYS[kind], "rope_theta", "partial_rotary_factor"}
        and all(map(is_number_or_whole, numbers.values()))
        and is_part(numbers.get("partial_rotary_factor", 1.0))
        and is_width(numbers.get("original_max_position_embeddings", 1))
        and (kind != "llama3" or numbers["low_freq_factor"] < numbers["high_freq_factor"])
    )


def is_rope_by_kind(value: Any) -> bool:
    """Return True for rotary parameters of each kind of attention by itself."""
    return type(value) is dict and value.keys() == set(KINDS) and all(map(is_rope, value.values()))
