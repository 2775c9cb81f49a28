"""Powers of two that move from the inputs of layers into their weights, without a change of what a model computes.

A layer computes the same if its inputs are divided by factors, and the columns of its weight are multiplied with them.
Inputs are divided where they come from: in the weight of a norm, or in the rows of another linear layer. With powers of
two every product and every sum has the same digits as before, so a fold is exact in any floating type.

Folds are found by trying, for any architecture: a fold is one if a block gives the same bits with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.statistics import Collected, Statistics

ReadRows = Callable[[str, int, int], torch.Tensor]  # name of a weight, first row and stop row

TRIED_TOKENS = 16
TRIED_EXPONENTS = 3  # at most: folds that are none must change the block's output by far
LARGEST_EXPONENT = 12  # keeps weights far from the ends of every floating type


@dataclass(frozen=True)
class Fold:
    """A place where inputs of layers can be divided.

    Attributes:
        producer: the tensors whose rows are divided: weight (N,) or (N, K'), and bias (N,).
        consumers: weights (M, K) with the same input, whose columns are multiplied.
        places: for each of the K columns the row of the producer that it comes from, (K,) int64.
    """

    producer: tuple[str, ...]
    consumers: tuple[str, ...]
    places: torch.Tensor

    @property
    def rows(self) -> int:
        """Return N."""
        return int(self.places.max()) + 1

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest of the values (K,) of all columns that come from one row, (N,)."""
        return torch.zeros(self.rows).scatter_reduce_(0, self.places, values.float().cpu(), "amax")


@dataclass(frozen=True)
class FoldedPowers:
    """An equivalence of powers of two: exponents by the names of tensors.

    Attributes:
        divided: row exponents (N,) int8 of producers.
        multiplied: column exponents (K,) int8 of consumers.
    """

    divided: Mapping[str, torch.Tensor] = field(default_factory=dict)
    multiplied: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, fold: Fold, exponents: torch.Tensor) -> FoldedPowers:
        """Return the equivalence of one fold with the exponents (N,) of its producer's rows."""
        rows, columns = exponents.to(torch.int8), exponents[fold.places].to(torch.int8)
        return cls(dict.fromkeys(fold.producer, rows), dict.fromkeys(fold.consumers, columns))

    def __or__(self, other: FoldedPowers) -> FoldedPowers:
        """Return both; a tensor that both divide or multiply is not expected."""
        return FoldedPowers({**self.divided, **other.divided}, {**self.multiplied, **other.multiplied})

    def apply(self, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Return rows (n, ...) of the tensor `name`, changed; `first` is the number of the first row."""
        if name in self.divided:
            powers = torch.exp2(-self.divided[name][first : first + len(rows)].float()).to(rows)
            rows = rows * powers.view(-1, *(1,) * (rows.ndim - 1))
        if name in self.multiplied:
            rows = rows * torch.exp2(self.multiplied[name].float()).to(rows)
        return rows

    def reading(self, read: ReadRows) -> ReadRows:
        """Return a function that reads rows of a weight, changed."""
        return lambda name, first, stop: self.apply(name, read(name, first, stop), first)

    def divide(self, collected: Collected) -> dict[str, Statistics]:
        """Return the statistics of divided inputs; layers with the same input keep one object."""
        made: dict[int, Statistics] = {}
        for name, of in collected.items():
            if id(of) not in made:
                made[id(of)] = of.divided(self.multiplied[name]) if name in self.multiplied else of
        return {name: made[id(of)] for name, of in collected.items()}


def find_folds(
    model: BlockwiseModel, block: int, together: Iterable[Sequence[str]], ids: torch.Tensor, hidden: torch.Tensor
) -> list[Fold]:
    """Return the folds of a loaded block: at most one for the layers of each input.

    Args:
        model: the model.
        block: its number.
        together: the weights of the block's linear layers, those with the same input in one item.
        ids: tokens (B, T).
        hidden: the input (B, T, H) of the block.
    """
    ids, hidden = ids[:1, :TRIED_TOKENS], hidden[:1, :TRIED_TOKENS]
    expected = model.run(block, ids, hidden)
    draw = torch.Generator().manual_seed(0)
    found: list[Fold] = []
    taken: set[str] = set()
    for consumers in together:
        for fold in _candidates(model, block, consumers):
            if taken.isdisjoint(fold.producer) and _is_exact(model, block, ids, hidden, expected, fold, draw):
                found.append(fold)
                taken.update(fold.producer)
                break
    return found


def _candidates(model: BlockwiseModel, block: int, consumers: Sequence[str]) -> Iterator[Fold]:
    """Yield what may be folds into these layers: of each norm of their width, and of each other linear layer."""
    width = model.linear[consumers[0]][1]
    inside = model.names_of(block)
    for name in inside:
        parameter = model.skeleton.get_parameter(name) if name.endswith(".weight") else None
        if parameter is None or name in consumers or (name not in model.linear and parameter.ndim != 1):
            continue
        rows, bias = len(parameter), f"{name.removesuffix('weight')}bias"
        if width % rows:
            continue
        producer = (name, bias) if bias in inside else (name,)
        for places in _places(rows, width, model.skeleton.config):
            yield Fold(producer, tuple(consumers), places)


def _places(rows: int, width: int, config: Any) -> Iterator[torch.Tensor]:
    """Yield the rows that the columns may come from: one by one, or of heads that several heads of queries share."""
    if rows == width:
        yield torch.arange(width)
        return
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or width // heads
    if rows % size == 0 and rows > 1:
        yield torch.arange(rows).view(-1, 1, size).expand(-1, width // rows, -1).reshape(-1)


def _is_exact(
    model: BlockwiseModel,
    block: int,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    expected: torch.Tensor,
    fold: Fold,
    draw: torch.Generator,
) -> bool:
    """Return True if the block gives the same bits with a fold of random exponents, and others with half of it."""
    exponents = torch.randint(-TRIED_EXPONENTS, TRIED_EXPONENTS + 1, (fold.rows,), generator=draw)
    powers = FoldedPowers.of(fold, exponents)
    changed = {
        name: powers.apply(name, model.skeleton.get_parameter(name).data, 0)
        for name in (*fold.producer, *fold.consumers)
    }
    with model.replaced(changed):
        if not torch.equal(model.run(block, ids, hidden), expected):
            return False
    with model.replaced({name: changed[name] for name in fold.consumers}):
        return not torch.equal(model.run(block, ids, hidden), expected)
