"""The range of a layer's inputs over calibration text, and the one scale that rounds them with the least error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STEPS = 8  # bins for each power of two
LOWEST, HIGHEST = -32, 32  # exponents of two; smaller and larger numbers count in the outermost bins
BINS = (HIGHEST - LOWEST) * STEPS
CODES = 127.5  # eight bits cover so many steps to each side of zero, as torchao and compressed-tensors count them
SMALLEST = 1e-3  # of the largest input: no smaller range is considered
_TOGETHER = 1 << 22  # elements that are counted at a time


@dataclass(frozen=True)
class InputRange:
    """The sizes of the inputs of one layer.

    Attributes:
        counts: (BINS,) float64, the elements of a token by the logarithm of their absolute value; each counts as much
            as its squared error does in the layer's output.
        largest: the largest absolute value, a scalar in float32.
    """

    counts: torch.Tensor
    largest: torch.Tensor

    def scale(self) -> float:
        """Return the scale of codes in eight bits with the least expected squared error."""
        return self._best()[0]

    def error(self) -> float:
        """Return the expected squared error with that scale, summed over all elements."""
        return self._best()[1]

    def _best(self) -> tuple[float, float]:
        """Return the best scale, and its error.

        Inputs within the range are off by a third of a half step, in the mean of squares, and by themselves at most.
        Those beyond it become the outermost code.
        """
        largest = float(self.largest)
        if largest == 0:
            return 1.0, 0.0
        edges = 2 ** (LOWEST + torch.arange(BINS, dtype=torch.float64) / STEPS)
        middles = (edges * 2 ** (0.5 / STEPS)).clamp(max=largest)
        ranges = torch.cat([edges[(edges < largest) & (edges > SMALLEST * largest)], edges.new_tensor([largest])])
        steps = (ranges / CODES).unsqueeze(1)
        inside = torch.minimum(steps.square() / 12, middles.square())
        beyond = (middles - ranges.unsqueeze(1)).clamp(min=0).square()
        errors = (torch.maximum(inside, beyond) * self.counts.cpu()).sum(1)
        return float(steps[errors.argmin()]), float(errors.min())


@dataclass(frozen=True)
class ChannelRanges:
    """The sizes of each channel of the inputs of one layer.

    Attributes:
        tokens: T.
        counts: (K, BINS) float32, the elements by the logarithm of their absolute value.
        largest: the largest absolute value of each channel, (K,) float32.
    """

    tokens: int
    counts: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def of(cls, inputs: torch.Tensor) -> ChannelRanges:
        """Return the ranges of inputs (T, K) in float32."""
        width = inputs.shape[1]
        counts = torch.zeros(width * BINS, dtype=torch.float32, device=inputs.device)
        first = torch.arange(width, device=inputs.device) * BINS
        for part in inputs.split(max(1, _TOGETHER // width)):
            bins = part.abs().log2_().sub_(LOWEST).mul_(STEPS).clamp_(0, BINS - 1).long()  # of zeros the first
            counts += torch.bincount(bins.add_(first).flatten(), minlength=width * BINS)
        return cls(len(inputs), counts.view(width, BINS), inputs.abs().amax(0))

    def plus(self, other: ChannelRanges) -> ChannelRanges:
        """Return the ranges of both."""
        largest = torch.maximum(self.largest, other.largest)
        return ChannelRanges(self.tokens + other.tokens, self.counts + other.counts, largest)

    def together(self, energies: torch.Tensor, exponents: torch.Tensor | None = None) -> InputRange:
        """Return the range of all channels of one token.

        Args:
            energies: how much an element of each channel counts, (K,).
            exponents: of powers of two that the channels are divided by, (K,); None for zeros.
        """
        counts, largest = self.counts.cpu(), self.largest.cpu()
        if exponents is not None:
            largest = largest / torch.exp2(exponents.float())
            places = torch.arange(BINS) - STEPS * exponents.long().unsqueeze(1)
            counts = torch.zeros_like(counts).scatter_add_(1, places.clamp(0, BINS - 1), counts)
        return InputRange(energies.double() @ counts.double() / self.tokens, largest.amax())
