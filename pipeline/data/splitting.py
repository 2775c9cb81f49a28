"""The split into training and held-out examples, the same for any order of the rows.

Every learned answer counts: two examples that learn an answer in the same context are on the same side. So are the rows
of a data set with one row for each turn of a conversation, because each row repeats the answers of the rows before.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipeline.config.schema import Data
from pipeline.data.example import Example
from pipeline.errors import DataError

SPLIT_BY = "first learned answer"  # recorded, because earlier versions split by the last answer

Examples = tuple[Example, ...]


def split(examples: Sequence[Example], data: Data, loss_on: str = "auto") -> tuple[Examples, Examples, int]:
    """Drop duplicates, take `data.limit` examples, and hold some out.

    Args:
        loss_on: the answers that are learned, as in `train.loss_on`.

    Returns:
        Training examples, held-out examples, and how many duplicates were dropped.

    Raises:
        DataError: if there is too little to split.
    """
    unique = in_order(examples, data.seed)
    train, held_out = _halves(unique[: data.limit], data, loss_on)
    return train, held_out, len(examples) - len(unique)


def in_order(examples: Iterable[Example], seed: int) -> Examples:
    """Return the examples without duplicates, in an order that depends only on them and the seed."""
    unique = {example.canonical(): example for example in examples}
    return tuple(unique[text] for text in sorted(unique, key=lambda text: _shuffled(seed, "order", text)))


def apart(train: Examples, held_out: Examples, loss_on: str = "auto") -> Examples:
    """Return the training examples that learn no answer in the same context as a held-out example."""
    measured = {context for example in held_out for context in example.contexts(loss_on)}
    return tuple(example for example in train if measured.isdisjoint(example.contexts(loss_on)))


def repeat(train: Examples, weights: Mapping[str, float], seed: int) -> Examples:
    """Return each training example as often as its weight says.

    Of a weight with a fraction, that share of its examples is used once more: those that come first in an order that
    depends only on them and the seed.

    Args:
        weights: the weight of an example by its canonical form.
        seed: the seed of the split.
    """
    by_weight: dict[float, list[str]] = {}
    for example in train:
        by_weight.setdefault(weights[text := example.canonical()], []).append(text)
    times = {}
    for weight, texts in by_weight.items():
        whole, more = int(weight), round(len(texts) * (weight % 1))
        for number, text in enumerate(sorted(texts, key=lambda text: _shuffled(seed, "weight", text))):
            times[text] = whole + (number < more)
    most = max(times.values(), default=0)
    return tuple(example for turn in range(most) for example in train if times[example.canonical()] > turn)


def trained_from(train: Iterable[Example], seed: int, loss_on: str = "auto") -> str:
    """Return the place in the order of the split at which training begins: 16 hex digits.

    Prompts are held out from the beginning of that order on, which depends only on the prompt and the seed. An example
    before this place was not trained on, whether or not it was among the rows. So new rows can be told from those that
    a model has seen.
    """
    return min((place(example.prompt(loss_on), seed) for example in train), default="")


def place(prompt: str, seed: int) -> str:
    """Return the place of a prompt in the order of the split: 16 hex digits."""
    return _shuffled(seed, "split", prompt).hex()[:16]


def answers_of_split(split_by: str | None, loss_on: str) -> str:
    """Return the answers by which a release was split, as `train.loss_on` says it.

    Args:
        split_by: what the release records; earlier versions record nothing, and split by the last answer.
        loss_on: its `train.loss_on`.
    """
    return loss_on if split_by == SPLIT_BY else "completion"


def fingerprint(*splits: Iterable[Example]) -> str:
    """Return the sha256, in hex, over the examples of all splits."""
    digest = hashlib.sha256()
    for part in splits:
        for example in part:
            digest.update(example.canonical().encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _halves(examples: Sequence[Example], data: Data, loss_on: str) -> tuple[Examples, Examples]:
    groups = _groups(examples, loss_on)
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise DataError(f"{data.named}: too small to hold something out: {_why_one_group(examples, loss_on)}")
    wanted = max(1, round(data.held_out * len(examples)))
    places: dict[int, bytes] = {}
    for example, group in zip(examples, groups, strict=True):
        found = _shuffled(data.seed, "split", example.prompt(loss_on))
        places[group] = min(found, places.get(group, found))
    order = sorted(sizes, key=places.__getitem__)
    chosen: set[int] = set()
    held = 0
    for group in order:
        if held + sizes[group] <= wanted and len(chosen) < len(sizes) - 1:
            chosen.add(group)
            held += sizes[group]
    if not chosen:  # every group is larger than what was to be held out
        chosen.add(min(order, key=sizes.__getitem__))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, group in zip(examples, groups, strict=True):
        sides[group in chosen].append(example)
    return tuple(sides[0]), tuple(sides[1])


def _groups(examples: Sequence[Example], loss_on: str) -> list[int]:
    """Return the group of each example: examples that learn an answer in the same context share one."""
    parent = list(range(len(examples)))
    first: dict[bytes, int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, example in enumerate(examples):
        for context in example.contexts(loss_on):
            parent[root(i)] = root(first.setdefault(context, i))
    return [root(i) for i in range(len(examples))]


def _why_one_group(examples: Sequence[Example], loss_on: str) -> str:
    if len(examples) < 2:
        return f"{len(examples)} different example(s); at least 2 are needed"
    if all(len(example.answers(loss_on)) < 2 for example in examples):
        return "all prompts are the same; at least 2 different ones are needed"
    return (
        "all conversations begin with the same question, and its answer is learned in each of them. "
        "Try: --set train.loss_on=completion"
    )


def _shuffled(seed: int, purpose: str, text: str) -> bytes:
    """Return a sort key that is as good as random, and the same everywhere."""
    return hashlib.sha256(f"{seed}\n{purpose}\n{text}".encode()).digest()
