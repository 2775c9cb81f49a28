"""Statistics of a linear layer's inputs over calibration text, and which of them a run needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.catalog import ROUNDINGS, Need
from pipeline.errors import QuantizationError

if TYPE_CHECKING:
    import torch

    from pipeline.config.quantize import VariantSpec


@dataclass(frozen=True)
class Statistics:
    """What was collected of the inputs (T, K) of one linear layer.

    Attributes:
        tokens: T.
        second_moments: mean of the squares, (K,) float32.
        gram: inputs.T @ inputs / T, (K, K) float32; None if no rounding needs it.
    """

    tokens: int
    second_moments: torch.Tensor
    gram: torch.Tensor | None = None


Collected = Mapping[str, Statistics]  # name of a weight -> statistics of its layer's inputs


def needed(specs: Iterable[VariantSpec]) -> Need:
    """Return the most that a rounding of these variants needs; it decides whether a calibration pass is run."""
    needs = list(Need)
    return max((ROUNDINGS[spec.rounding].needs for spec in specs if spec.rounding), key=needs.index, default=needs[0])


def check_collected(specs: Iterable[VariantSpec], collected: Collected | None = None) -> None:
    """Refuse variants whose rounding needs statistics that nobody collected.

    Raises:
        QuantizationError: with the names of the variant, its rounding, and the statistics.
    """
    for spec in specs:
        need = needed([spec])
        there = collected and (need != Need.GRAM_MATRIX or all(s.gram is not None for s in collected.values()))
        if need != Need.NOTHING and not there:
            raise QuantizationError(
                f"{spec.name}: rounding {spec.rounding} needs statistics that were not collected ({need.value} of "
                f"each layer's inputs). Try: another rounding"
            )
