"""Powers of two that move from the inputs of layers into their weights, without a change of what a model computes.

A layer computes the same if its inputs are divided by factors, and the columns of its weight are multiplied with them.
Inputs are divided where they come from: in the weight of a norm, or in the rows of another linear layer. With powers of
two, every product and every sum keeps its digits, so a fold is exact in bfloat16 and float32. In float16, numbers below
6e-5 lose digits; `calibration.folds` limits the exponents for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pipeline.quantization.statistics import Collected, Statistics

if TYPE_CHECKING:
    from pipeline.quantization.calibration.rounding import ReadRows


@dataclass(frozen=True)
class Fold:
    """A place where inputs of layers can be divided.

    Attributes:
        producer: the tensors whose rows are divided: weight (N,) or (N, K'), and bias (N,).
        consumers: weights (M, K) with the same input, whose columns are multiplied.
        row_of_column: the row of the producer that each of the K columns comes from, (K,) int64.
    """

    producer: tuple[str, ...]
    consumers: tuple[str, ...]
    row_of_column: torch.Tensor

    @property
    def rows(self) -> int:
        """Return N."""
        return int(self.row_of_column.max()) + 1

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest of the values (K,) of all columns that come from one row, (N,) float32."""
        return torch.zeros(self.rows).scatter_reduce_(0, self.row_of_column, values.float().cpu(), "amax")


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
        rows, columns = exponents.to(torch.int8), exponents[fold.row_of_column].to(torch.int8)
        return cls(dict.fromkeys(fold.producer, rows), dict.fromkeys(fold.consumers, columns))

    def __or__(self, other: FoldedPowers) -> FoldedPowers:
        """Return both; no tensor is divided by both, or multiplied by both."""
        return FoldedPowers({**self.divided, **other.divided}, {**self.multiplied, **other.multiplied})

    @property
    def names(self) -> set[str]:
        """Return the names of the tensors that change."""
        return {*self.divided, *self.multiplied}

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
