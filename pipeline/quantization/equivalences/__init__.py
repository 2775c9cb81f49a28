"""Changes of a model's weights that keep what the model computes, made in the writer's pass before rounding."""

from __future__ import annotations

from typing import Protocol

import torch

from pipeline.quantization.statistics import Collected


class Equivalence(Protocol):
    """A change of one model's weights, such as scales that are folded into neighbouring layers."""

    @property
    def names(self) -> set[str]:
        """Return the names of the tensors that change."""

    def divide(self, collected: Collected) -> Collected:
        """Return the statistics of the layers' inputs after the change."""

    def apply(self, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Return changed rows (n, ...) of the tensor `name`, with their shape and dtype; `rows` stay as they are.

        Args:
            first: the number of the first row. Several threads call this at once, each with rows of its own.
        """
