"""Statistics of a linear layer's inputs over calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.catalog import Need
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
        gram: inputs.T @ inputs / T, (K, K) float32; None if no rounding needs it. On the same device.
    """

    tokens: int
    second_moments: torch.Tensor
    gram: torch.Tensor | None = None


Collected = Mapping[str, Statistics]  # name of a weight -> statistics of its layer's inputs


def check_collected(spec: VariantSpec, collected: Collected) -> None:
    """Refuse a variant whose rounding needs statistics that nobody collected.

    Raises:
        QuantizationError: with the names of the variant, its rounding, and the statistics.
    """
    need = spec.need(False)
    there = collected and (need != Need.GRAM_MATRIX or all(s.gram is not None for s in collected.values()))
    if need != Need.NOTHING and not there:
        raise QuantizationError(
            f"{spec.name}: rounding {spec.rounding} needs statistics that were not collected ({need.value} of "
            f"each layer's inputs). Try: another rounding"
        )
