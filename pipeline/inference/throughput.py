"""Tokens per second at batch size 1. Imports nothing heavy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

State = TypeVar("State")

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 3
LONG = 5.0  # seconds; a round that takes longer is not repeated, and no more tokens are written in it
FEWEST_STEPS = 4  # tokens that are written in any case


def tokens_per_second(
    read: Callable[[int], State],
    write: Callable[[State], State],
    limit: int | None,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Measure the reading of a prompt and the writing after it, as medians over rounds.

    The first round warms up and is left out, unless it takes long.

    Args:
        read: reads a prompt of that many tokens from its beginning.
        write: writes one more token.
        limit: positions of the model; prompt and answer are shortened to fit.
    """
    limit = limit or prompt_tokens + new_tokens
    new_tokens = min(new_tokens, limit // 2)
    prompt_tokens = min(prompt_tokens, limit - new_tokens)
    prefills: list[float] = []
    steps: list[list[float]] = []
    for _ in range(repeats + 1):
        begun = now()
        state = read(prompt_tokens)
        prefills.append(now() - begun)
        steps.append([])
        while len(steps[-1]) < new_tokens and (len(steps[-1]) < FEWEST_STEPS or now() - begun < LONG):
            start = now()
            state = write(state)
            steps[-1].append(now() - start)
        if now() - begun >= LONG:
            break
    if len(steps) > 1:  # in a long round warming up makes no difference
        del prefills[0], steps[0]
    written = [seconds for round_ in steps for seconds in round_]
    return {
        "prefill_tokens_per_second": prompt_tokens / statistics.median(prefills),
        "decode_tokens_per_second": 1 / statistics.median(written),
        "prompt_tokens": prompt_tokens,
        "new_tokens": max(map(len, steps)),
    }
