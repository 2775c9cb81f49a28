"""The split into training and held-out examples, the same for any order of the rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.config.schema import Data
from pipeline.data.forms import Example
from pipeline.errors import DataError

Examples = tuple[Example, ...]


def split(examples: Sequence[Example], data: Data) -> tuple[Examples, Examples, int]:
    """Drop duplicates, take `data.limit` examples, and hold some out.

    All answers to one prompt go to one side; a text is its own prompt.

    Returns:
        Training examples, held-out examples, and how many duplicates were dropped.

    Raises:
        DataError: if there is too little to split.
    """
    unique = {example.canonical(): example for example in examples}
    kept = sorted(unique, key=lambda text: _shuffled(data.seed, "order", text))[: data.limit]
    train, held_out = _halves([unique[text] for text in kept], data)
    return train, held_out, len(examples) - len(unique)


def trained_from(train: Iterable[Example], seed: int) -> str:
    """Return the place in the order of the split at which training begins: 16 hex digits.

    Prompts are held out from the beginning of that order on, which depends only on the prompt and the seed. An example
    before this place was not trained on, whether or not it was among the rows. So new rows can be told from those that
    a model has seen.
    """
    return min((place(example, seed) for example in train), default="")


def place(example: Example, seed: int) -> str:
    """Return the place of an example's prompt in the order of the split: 16 hex digits."""
    return _shuffled(seed, "split", example.prompt()).hex()[:16]


def fingerprint(*splits: Iterable[Example]) -> str:
    """Return the sha256, in hex, over the examples of all splits."""
    digest = hashlib.sha256()
    for part in splits:
        for example in part:
            digest.update(example.canonical().encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _halves(examples: Sequence[Example], data: Data) -> tuple[Examples, Examples]:
    prompts = [example.prompt() for example in examples]
    groups = Counter(prompts)
    if len(groups) < 2:
        few = f"{len(examples)} different example(s)" if len(examples) < 2 else "all prompts are the same"
        raise DataError(f"{data.source}: too small to hold something out: {few}; at least 2 different ones are needed")
    wanted = max(1, round(data.held_out * len(examples)))
    order = sorted(groups, key=lambda prompt: _shuffled(data.seed, "split", prompt))
    chosen: set[str] = set()
    held = 0
    for prompt in order:
        if held + groups[prompt] <= wanted and len(chosen) < len(groups) - 1:
            chosen.add(prompt)
            held += groups[prompt]
    if not chosen:  # every prompt has more answers than were to be held out
        chosen.add(min(order, key=groups.__getitem__))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, prompt in zip(examples, prompts, strict=True):
        sides[prompt in chosen].append(example)
    return tuple(sides[0]), tuple(sides[1])


def _shuffled(seed: int, purpose: str, text: str) -> bytes:
    """Return a sort key that is as good as random, and the same everywhere."""
    return hashlib.sha256(f"{seed}\n{purpose}\n{text}".encode()).digest()
