"""The overlap of held-out examples with training examples.

`splitting` keeps what is learned in the same context on one side. But training may have the same answer to another
question, or a text that was copied and changed a little. Such examples make held-out figures look better than they
are, so they are counted. Two measures compare only the answers (or texts), in words without case and punctuation:

- the same: all answers of a held-out example occur as those of a training example;
- near: at least half of the runs of 8 words in a held-out example occur somewhere in training. An example with
  fewer than 8 words has no such run, and cannot be near.

A third counts single learned answers: training learns the same answer in exactly the same context. Only greetings at
the beginning of a conversation can be such answers.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.data.example import Example

if TYPE_CHECKING:
    import numpy as np

RUN = 8  # words
NEAR = 0.5  # share of a held-out example's runs

_MOST = 20_000  # held-out examples that are compared, which bounds the memory; their order is random
_BATCH = 1 << 20  # words in memory at once
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word of a run is lost modulo 2**64
# A word; in writing without spaces (Thai, Japanese, Chinese) a character.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True)
class Overlap:
    """Counts of held-out examples, and of single answers in them.

    Attributes:
        compared: held-out examples that were looked at.
        same: those whose answers training has word by word.
        near: those of which training has at least half of the runs of 8 words.
        answers: learned answers, or texts, in the compared examples.
        trained: those that training learns too, with exactly the same messages before them.
    """

    compared: int
    same: int
    near: int
    answers: int
    trained: int


def overlap(train: Sequence[Example], held_out: Sequence[Example], loss_on: str = "auto") -> Overlap:
    """Compare held-out examples with training examples; 100,000 rows take seconds.

    `loss_on` says which answers are learned, as in `train.loss_on`.
    Memory depends on the held-out examples (20,000 of them at most), not on the training ones.
    """
    import numpy as np

    held_out = held_out[:_MOST]
    numbers: dict[str, int] = {}  # word -> number from 1; words that held-out examples have not are all 0
    answers: list[bytes] = []
    run_parts, owner_parts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for batch in _batches(held_out):
        for word in itertools.chain.from_iterable(batch):
            numbers.setdefault(word, len(numbers) + 1)
        part, owner = _runs(batch, numbers)
        run_parts.append(part)
        owner_parts.append(owner + len(answers))
        answers += map(_digest, batch)
    runs, owners = np.concatenate(run_parts), np.concatenate(owner_parts)
    known, places = np.unique(runs, return_inverse=True)
    seen, wanted, same = np.zeros(len(known), bool), set(answers), set()
    for batch in _batches(train):
        same.update(wanted.intersection(map(_digest, batch)))
        found, _ = _runs(batch, numbers)
        if len(known):
            at = np.minimum(np.searchsorted(known, found), len(known) - 1)
            seen[at[known[at] == found]] = True
    of_all = np.bincount(owners, minlength=len(held_out))
    of_shared = np.bincount(owners[seen[places]], minlength=len(held_out))
    near = (of_all > 0) & (of_shared >= NEAR * of_all)
    learned = [answer for example in held_out for answer in example.learned_in_context(loss_on)]
    asked = set(learned)
    trained = {answer for example in train for answer in example.learned_in_context(loss_on) if answer in asked}
    return Overlap(
        compared=len(held_out),
        same=sum(answer in same for answer in answers),
        near=int(near.sum()),
        answers=len(learned),
        trained=sum(answer in trained for answer in learned),
    )


def _batches(examples: Iterable[Example]) -> Iterator[list[list[str]]]:
    """Yield the words to be learned of each example, about a million words at a time."""
    batch, size = [], 0
    for example in examples:
        text = "\n".join(example.learned()).lower()
        batch.append(_WORD.findall(text) or [text])
        size += len(batch[-1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _digest(words: list[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def _runs(parts: list[list[str]], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a 64-bit number for each run of known words, and the part that it is in."""
    import numpy as np

    lengths = np.array([len(part) for part in parts], np.int64)
    words = np.fromiter((numbers.get(word, 0) for part in parts for word in part), np.uint64, int(lengths.sum()))
    count = max(0, len(words) - RUN + 1)
    runs, known = np.zeros(count, np.uint64), np.ones(count, bool)
    for i in range(RUN):
        window = words[i : i + count]
        runs = (runs ^ window) * np.uint64(_FACTOR)
        runs ^= runs >> np.uint64(29)
        known &= window > 0
    owners = np.repeat(np.arange(len(parts)), lengths)
    whole = known & (owners[:count] == owners[RUN - 1 :])  # a run does not go from one example into the next
    return runs[whole], owners[:count][whole]
