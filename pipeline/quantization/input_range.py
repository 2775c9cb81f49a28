"""The range of a layer's inputs over calibration text, and the one scale that rounds them with the least error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STEPS = 8  # bins for each power of two
LOWEST, HIGHEST = -32, 32  # exponents of two; smaller and larger numbers count in the outermost bins
BINS = (HIGHEST - LOWEST) * STEPS
CODES = 127.5  # eight bits cover so many steps to each side of zero, as torchao and compressed-tensors count them
SMALLEST = 1e-3  # of the largest input: no smaller range is considered


@dataclass(frozen=True)
class InputRange:
    """The sizes of the inputs of one layer.

    Attributes:
        counts: (BINS,) float64, the number of elements by the logarithm of their absolute value.
        largest: the largest absolute value, a scalar in float32.
    """

    counts: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def of(cls, inputs: torch.Tensor) -> InputRange:
        """Return the range of inputs (T, K) in float32."""
        sizes = inputs.abs()
        places = sizes.log2().sub_(LOWEST).mul_(STEPS).clamp_(0, BINS - 1)  # of zeros the first
        return cls(torch.histc(places, BINS, 0, BINS).double(), sizes.amax())

    def plus(self, other: InputRange) -> InputRange:
        """Return the range of both."""
        return InputRange(self.counts + other.counts, torch.maximum(self.largest, other.largest))

    def scale(self) -> float:
        """Return the scale of codes in eight bits with the least expected squared error.

        Inputs within the range are off by a third of a half step, in the mean of squares, and by themselves at most.
        Those beyond it become the outermost code.
        """
        largest = float(self.largest)
        if largest == 0:
            return 1.0
        edges = 2 ** (LOWEST + torch.arange(BINS, dtype=torch.float64) / STEPS)
        middles = (edges * 2 ** (0.5 / STEPS)).clamp(max=largest)
        ranges = torch.cat([edges[(edges < largest) & (edges > SMALLEST * largest)], edges.new_tensor([largest])])
        steps = (ranges / CODES).unsqueeze(1)
        inside = torch.minimum(steps.square() / 12, middles.square())
        beyond = (middles - ranges.unsqueeze(1)).clamp(min=0).square()
        errors = (torch.maximum(inside, beyond) * self.counts.cpu()).sum(1)
        return float(steps[errors.argmin()])
