"""What to change in a configuration that does not fit: settings that change least come first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipeline.config.loader import parse_config
from pipeline.config.schema import PACKAGE_SOURCE, Config, Train
from pipeline.config.training_catalog import METHODS, SMALLEST_METHOD, UNCHANGED_BASE

SHORTEST = 128  # tokens of a training sequence; below, most examples would be cut
SMALLEST_RANK = 4

Short = Callable[[Config], bool]  # is there not enough of something, with that configuration?


@dataclass(frozen=True)
class Change:
    """A setting by its dotted key, and why it helps."""

    key: str
    value: object
    why: str

    @property
    def setting(self) -> str:
        """As `--set` takes it."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key}={'null' if value is None else value}"


def advise(config: Config, still_short: Short) -> list[Change]:
    """The changes after which nothing is short any more; those that do not help on the way are left out.

    Returns:
        Nothing where no changes that are known are enough.
    """
    made: dict[str, Change] = {}
    for changes in _ladder(config):
        made |= {change.key: change for change in changes}
        if not still_short(_with(config, made.values())):
            return _without_idle(config, made, still_short)
    return []


def _ladder(config: Config) -> Iterator[list[Change]]:
    """One step after the other, each on top of those before."""
    train = config.train
    if not config.data and not config.merges and config.evaluate is None and _is_on_hub(config):
        yield [Change("model.low_disk", True, "two shards are on the disk at a time")]
    if config.evaluate and config.evaluate.device == "cuda":
        yield [Change("evaluate.device", "auto", "models are measured on the GPU where there is one, else on the CPU")]
    if config.data:
        if METHODS[train.method].bits > SMALLEST_METHOD.bits:
            yield [Change("train.method", SMALLEST_METHOD.name, SMALLEST_METHOD.said)]
        if config.merge.base == "auto":
            why = "one merged model on the disk at a time, and none compared in memory"
            yield [Change("merge.base", UNCHANGED_BASE, why)]
        for size, accumulate in smaller_batches(train):
            yield [
                Change("train.batch_size", size, "fewer sequences at a time"),
                Change("train.accumulate", accumulate, "as many in a step as before"),
            ]
        length = train.max_length
        while length > SHORTEST:
            length = max(SHORTEST, length // 2)
            yield [Change("train.max_length", length, "shorter sequences; longer answers are cut")]
        rank = train.lora.rank
        while rank > SMALLEST_RANK:
            rank = max(SMALLEST_RANK, rank // 2)
            yield [Change("train.lora.rank", rank, "a smaller adapter")]


def smaller_batches(train: Train) -> Iterator[tuple[int, int]]:
    """Batch sizes below the present one, the largest first, each with the accumulation that keeps a step as it is."""
    step = train.batch_size * train.accumulate
    low = [size for size in range(1, math.isqrt(step) + 1) if step % size == 0]
    for size in sorted({*low, *(step // size for size in low)}, reverse=True):
        if size < train.batch_size:
            yield size, step // size


def _without_idle(config: Config, made: dict[str, Change], still_short: Short) -> list[Change]:
    """The changes that are needed: each of the others is taken back."""
    for key in list(made):
        if key == "train.accumulate":  # goes with the batch size
            continue
        dropped = {key, "train.accumulate"} if key == "train.batch_size" else {key}
        rest = {k: change for k, change in made.items() if k not in dropped}
        if not still_short(_with(config, rest.values())):
            made = rest
    return list(made.values())


def _with(config: Config, changes: Iterable[Change]) -> Config:
    return parse_config(config.model_dump(), "plan", [change.setting for change in changes])


def _is_on_hub(config: Config) -> bool:
    from pipeline.models.sources import is_local

    return not PACKAGE_SOURCE.match(config.model.source) and not is_local(config.model.source)
