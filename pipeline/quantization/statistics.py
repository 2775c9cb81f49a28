"""Statistics of a linear layer's inputs over calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.config.catalog import Need
from pipeline.errors import QuantizationError

if TYPE_CHECKING:
    import torch

    from pipeline.config.quantize import VariantSpec
    from pipeline.quantization.input_range import InputRange


@dataclass(frozen=True)
class Statistics:
    """What was collected of the inputs (T, K) of one linear layer.

    Attributes:
        tokens: T.
        second_moments: mean of the squares, (K,) float32.
        gram: inputs.T @ inputs / T, (K, K) float32; None if no rounding needs it. On the same device.
        range: their range after smoothing (`equivalences.smoothing`); None if no variant needs it.
    """

    tokens: int
    second_moments: torch.Tensor
    gram: torch.Tensor | None = None
    range: InputRange | None = None

    def divided(self, exponents: torch.Tensor) -> Statistics:
        """Return the statistics of inputs whose channels are divided by powers of two; the range stays.

        Args:
            exponents: of the channels, (K,).
        """
        powers = exponents.to(self.second_moments.device).float().exp2()
        gram = None if self.gram is None else self.gram / powers / powers.unsqueeze(1)
        return replace(self, second_moments=self.second_moments / powers.square(), gram=gram)


Collected = Mapping[str, Statistics]  # name of a weight -> statistics of its layer's inputs


def check_collected(spec: VariantSpec, collected: Collected) -> None:
    """Refuse a variant that needs statistics that nobody collected.

    Raises:
        QuantizationError: with the names of the variant, of what needs them, and of the statistics.
    """
    need = spec.need(False)
    parts = {Need.GRAM_MATRIX: "gram", Need.RANGES: "range"}
    part = parts.get(need, "second_moments")
    there = collected and all(getattr(statistics, part) is not None for statistics in collected.values())
    if need != Need.NOTHING and not there:
        raise QuantizationError(
            f"{spec.name}: {spec.needing} needs statistics that were not collected ({need.value} of each layer's "
            "inputs). Try: quality=calibrated"
        )
