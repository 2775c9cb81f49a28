"""Tokens per second at batch 1, of whatever reads and writes tokens. Imports nothing heavy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

State = TypeVar("State")

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 3


def tokens_per_second(
    read: Callable[[int], State],
    write: Callable[[State], State],
    limit: int | None,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Reading a prompt, and writing after it. Medians over rounds, after one that warms up.

    Args:
        read: reads a prompt of so many tokens from its beginning.
        write: goes on from there by one token.
        limit: positions that the model has; prompt and answer are shortened to what they hold.
    """
    limit = limit or prompt_tokens + new_tokens
    new_tokens = min(new_tokens, limit // 2)
    prompt_tokens = min(prompt_tokens, limit - new_tokens)
    prefills, steps = [], []
    for attempt in range(repeats + 1):
        start = now()
        state = read(prompt_tokens)
        prefill = now() - start
        for _ in range(new_tokens):
            start = now()
            state = write(state)
            if attempt:
                steps.append(now() - start)
        if attempt:
            prefills.append(prefill)
    return {
        "prefill_tokens_per_second": prompt_tokens / statistics.median(prefills),
        "decode_tokens_per_second": 1 / statistics.median(steps),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }
