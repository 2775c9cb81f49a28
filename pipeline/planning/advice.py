"""Advice for a configuration that does not fit, the mildest changes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipeline.config.loader import parse_config
from pipeline.config.schema import PACKAGE_SOURCE, Config, Train
from pipeline.config.training_catalog import METHODS, UNCHANGED_BASE

SHORTEST_LENGTH = 128  # tokens of a training sequence; most examples are cut below it
SMALLEST_RANK = 4

IsShort = Callable[[Config], bool]  # True if the machine has too little for the configuration


@dataclass(frozen=True)
class Change:
    """A setting by its dotted key, with the reason that it helps."""

    key: str
    value: object
    why: str

    @property
    def setting(self) -> str:
        """Return the change as `--set` takes it."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key}={'null' if value is None else value}"


def advise(config: Config, is_short: IsShort) -> list[Change]:
    """Return the changes with which a configuration fits, without any that is not needed.

    Returns:
        An empty list if no known changes are enough.
    """
    made: dict[str, Change] = {}
    for changes in _ladder(config):
        made |= {change.key: change for change in changes}
        if not is_short(_with(config, made.values())):
            return _needed(config, made, is_short)
    return []


def _ladder(config: Config) -> Iterator[list[Change]]:
    """Yield one step of changes after the other; each comes on top of those before."""
    train = config.train
    if not config.data and not config.merges and config.evaluate is None and _is_on_hub(config):
        yield [Change("model.low_disk", True, "the disk holds only two shards at a time")]
    if config.evaluate and config.evaluate.device == "cuda":
        yield [Change("evaluate.device", "auto", "models are measured on the CPU if there is no GPU")]
    if config.data:
        for method in sorted(METHODS.values(), key=lambda method: -method.bits):
            if method.bits < METHODS[train.method].bits:
                yield [Change("train.method", method.name, method.said)]
        if config.merge.base == "auto":
            yield [Change("merge.base", UNCHANGED_BASE, "only one merged model is made, so none are compared")]
        for size, accumulate in smaller_batches(train):
            yield [
                Change("train.batch_size", size, "fewer sequences at a time"),
                Change("train.accumulate", accumulate, "the same number of sequences in a step"),
            ]
        length = train.max_length
        while length > SHORTEST_LENGTH:
            length = max(SHORTEST_LENGTH, length // 2)
            yield [Change("train.max_length", length, "shorter sequences; longer answers are cut")]
        rank = train.lora.rank
        while rank > SMALLEST_RANK:
            rank = max(SMALLEST_RANK, rank // 2)
            yield [Change("train.lora.rank", rank, "a smaller adapter")]


def smaller_batches(train: Train) -> Iterator[tuple[int, int]]:
    """Yield smaller batch sizes, the largest first, each with the accumulation that keeps the step's size."""
    step = train.batch_size * train.accumulate
    low = [size for size in range(1, math.isqrt(step) + 1) if step % size == 0]
    for size in sorted({*low, *(step // size for size in low)}, reverse=True):
        if size < train.batch_size:
            yield size, step // size


def _needed(config: Config, made: dict[str, Change], is_short: IsShort) -> list[Change]:
    """Return the changes that are needed, after trying to take back each one."""
    for key in list(made):
        if key == "train.accumulate":  # goes with the batch size
            continue
        dropped = {key, "train.accumulate"} if key == "train.batch_size" else {key}
        rest = {k: change for k, change in made.items() if k not in dropped}
        if not is_short(_with(config, rest.values())):
            made = rest
    return list(made.values())


def _with(config: Config, changes: Iterable[Change]) -> Config:
    return parse_config(config.model_dump(), "plan", [change.setting for change in changes])


def _is_on_hub(config: Config) -> bool:
    from pipeline.models.sources import is_local

    return not PACKAGE_SOURCE.match(config.model.source) and not is_local(config.model.source)
