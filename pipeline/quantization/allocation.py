"""Allocation: the bits and the group size of each layer, so that a variant loses least for its size.

Layers with the same input (queries, keys and values; gate and up) get the same, because servers fuse them. Losses of
layers add up, so the choice is a knapsack with several options for each group of layers. A table over bytes, in bins,
finds its optimum. Options count with their bytes rounded up, so a result never exceeds its budget.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.config.catalog import EIGHT_BITS, KEEP
from pipeline.config.quantize import VariantSpec, matches
from pipeline.quantization.formats import sizes

BINS = 30_000  # of bytes, which torch does not divide among threads; fewer if options differ by larger steps
ROUNDING = 1e-9  # of sums of losses, as a share
KEPT = 16  # the bits of an option that leaves weights as they are
Shapes = Mapping[str, tuple[int, int]]
Loss = Callable[[str, int, int | None], float]  # name of a weight, bits, group size -> nats a token


@dataclass(frozen=True)
class Option:
    """One way to store a group of layers.

    Attributes:
        bits: of a weight; 8 has one scale a row, and `KEPT` leaves weights as they are.
        group_size: columns that share a scale; None for a row.
        bytes: of all its weights.
        loss: expected KL divergence, in nats a token.
    """

    bits: int
    group_size: int | None
    bytes: int
    loss: float


@dataclass(frozen=True)
class Group:
    """Weights that are stored in the same way, by name, and their options."""

    names: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """One option for each group, in their order."""

    chosen: tuple[Option, ...]

    @property
    def bytes(self) -> int:
        """Return the bytes of all groups."""
        return sum(option.bytes for option in self.chosen)

    @property
    def loss(self) -> float:
        """Return the expected KL divergence of the whole, in nats a token."""
        return sum(option.loss for option in self.chosen)


def best_within(groups: Sequence[Group], most_bytes: int) -> Allocation | None:
    """Return the allocation with the least loss in at most so many bytes; None if none is so small."""
    return _solve(groups, most_bytes, None)


def smallest_within(groups: Sequence[Group], most_loss: float) -> Allocation | None:
    """Return the smallest allocation with at most this loss; None if none loses so little."""
    found = _solve(groups, sum(max(option.bytes for option in group.options) for group in groups), most_loss)
    return found and (_solve(groups, found.bytes, most_loss) or found)  # in smaller bins, if it fits there


def bounds(groups: Sequence[Group]) -> tuple[int, int]:
    """Return the bytes of the smallest and of the largest allocation."""
    by_bytes = [sorted(option.bytes for option in group.options) for group in groups]
    return sum(options[0] for options in by_bytes), sum(options[-1] for options in by_bytes)


def _solve(groups: Sequence[Group], most_bytes: int, most_loss: float | None) -> Allocation | None:
    """Return the best allocation of at most `most_bytes`, or the smallest of these with at most `most_loss`."""
    least = bounds(groups)[0]
    if least > most_bytes:
        return None
    extra = [[o.bytes - min(other.bytes for other in group.options) for o in group.options] for group in groups]
    common = math.gcd(*(count for options in extra for count in options)) or 1
    unit = max(common, -(-(most_bytes - least) // BINS))
    bins = (most_bytes - least) // unit
    best = torch.zeros(bins + 1, dtype=torch.float64)  # by bytes: the least loss of the groups so far
    taken = []
    for group, options in zip(groups, extra, strict=True):
        before, best = best, torch.full_like(best, torch.inf)
        choice = torch.zeros(bins + 1, dtype=torch.int8)
        for number, (option, count) in enumerate(zip(group.options, options, strict=True)):
            if (cost := -(-count // unit)) <= bins:
                found = before[: bins + 1 - cost] + option.loss
                is_better = found < best[cost:]
                best[cost:] = torch.where(is_better, found, best[cost:])
                choice[cost:].masked_fill_(is_better, number)
        taken.append(choice)
    at = bins
    if most_loss is not None:
        enough = (best <= most_loss * (1 + ROUNDING)).nonzero()
        if not len(enough):
            return None
        at = int(enough[0])
    chosen = []
    for group, options, choice in reversed(list(zip(groups, extra, taken, strict=True))):
        number = int(choice[at])
        chosen.append(group.options[number])
        at -= -(-options[number] // unit)
    return Allocation(tuple(reversed(chosen)))


def groups_of(
    spec: VariantSpec,
    fused: Iterable[Sequence[str]],
    linear: Shapes,
    tables: Shapes,
    item_bytes: Mapping[str, float],
    loss: Loss,
    only_eight: Collection[str] = (),
) -> list[Group]:
    """Return the groups of a model's weights with the options that a variant allows.

    Args:
        spec: its `keep` and `int8` leave a layer no choice, and neither does a value of `embeddings`.
        fused: names of linear weights, by group; all of `linear` are in one of them.
        tables: the embedding and the output head, if they can be quantized.
        item_bytes: bytes of an element in the source, by weight.
        loss: the expected loss of an option.
        only_eight: layers that cannot have fewer bits than eight.
    """
    by, groups = sizes(spec), []
    in_eight: tuple[int, int | None] = (8, None)
    kept: tuple[int, int | None] = (KEPT, None)

    def option(names: Sequence[str], shapes: Shapes, bits: int, group_size: int | None) -> Option:
        count = 0.0
        for name in names:
            if bits == KEPT:
                count += by.plain_bytes(spec, shapes[name], item_bytes[name])
            elif bits == 8:
                count += by.table_bytes(spec, shapes[name])
            else:
                count += by.layer_bytes(spec.model_copy(update={"group_size": group_size}), shapes[name])
        lost = 0.0 if bits == KEPT else sum(max(0.0, loss(name, bits, group_size)) for name in names)
        return Option(bits, group_size, int(count), lost)

    for names in fused:
        ways = [in_eight, kept]
        if any(matches(spec.keep, name) for name in names):
            ways = [kept]
        elif any(matches(spec.int8, name) for name in names):
            ways = [in_eight]
        elif not any(name in only_eight for name in names):
            widths = {linear[name][1] for name in names}
            fitting = [size for size in spec.variant.group_sizes if not any(width % size for width in widths)]
            ways = [*((spec.variant.bits, size) for size in fitting), *ways]
        groups.append(Group(tuple(names), tuple(option(names, linear, *way) for way in ways)))
    if tables:
        ways = {None: [in_eight, kept], EIGHT_BITS: [in_eight], KEEP: [kept]}[spec.embeddings]
        groups.append(Group(tuple(tables), tuple(option(list(tables), tables, *way) for way in ways)))
    return groups


def settings(spec: VariantSpec, groups: Sequence[Group], made: Allocation, tables: Shapes) -> VariantSpec:
    """Return the variant with the settings of an allocation."""
    layers: dict[tuple[int, int | None], list[str]] = {}
    embeddings = KEEP
    for group, option in zip(groups, made.chosen, strict=True):
        if tables and group.names[0] in tables:
            embeddings = EIGHT_BITS if option.bits == 8 else KEEP
            continue
        of_kind = layers.setdefault((option.bits, option.group_size), [])
        of_kind += (name.removesuffix(".weight") for name in group.names)
    by_size = {size: sorted(names) for (bits, size), names in layers.items() if size and bits not in (8, KEPT)}
    most = Counter({size: len(names) for size, names in by_size.items()}).most_common(1)
    usual = most[0][0] if most else spec.group_size
    return spec.model_copy(
        update={
            "group_size": usual,
            "group_sizes": {str(size): names for size, names in sorted(by_size.items()) if size != usual},
            "embeddings": embeddings,
            EIGHT_BITS: sorted(layers.get((8, None), [])),
            KEEP: sorted(layers.get((KEPT, None), [])),
        }
    )
