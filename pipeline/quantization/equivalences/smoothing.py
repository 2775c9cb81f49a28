"""Smoothing: weights that take over a part of the range of their inputs, for inputs with one scale for all tokens.

A few channels of a layer's inputs can be a hundred times larger than the others, so one scale rounds those away.
After a fold the large channels are smaller, and the columns of the weight that multiply them are larger. By how much
is chosen for each fold: SmoothQuant's rule (Xiao et al., 2022) gives some ways, and the one with the smallest expected
error of the outputs is taken. A fold that lowers no error is left out.

https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.quantization.equivalences.folding import LARGEST_EXPONENT, Fold, FoldedPowers
from pipeline.quantization.input_range import CODES, ChannelRanges

SHARES = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)  # of the inputs' range that weights take over
SMALLEST = 1e-5  # for logarithms


def smoothed(
    fold: Fold, inputs: ChannelRanges, second_moments: torch.Tensor, weights: Sequence[torch.Tensor]
) -> FoldedPowers | None:
    """Return the powers of a fold that lower the expected error of its layers' outputs most; None if none does.

    Args:
        inputs: the ranges of the K channels of the inputs.
        second_moments: mean squares of the inputs, (K,).
        weights: of the consumers, (M, K) each, in any floating type.
    """
    columns = torch.stack([weight.abs().amax(0).float().cpu() for weight in weights]).amax(0)
    large, heavy = (fold.largest(values).clamp(min=SMALLEST).log2() for values in (inputs.largest, columns))
    energies, moments = column_energies(weights), second_moments.cpu()
    none = torch.zeros(len(moments), dtype=torch.int8)
    best, least = None, _error(inputs, energies, moments, weights, none)
    for share in SHARES:
        wanted = share * large - (1 - share) * heavy
        exponents = (wanted - wanted.median()).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)
        found = _error(inputs, energies, moments, weights, exponents[fold.places])
        if found < least:
            best, least = exponents, found
    return None if best is None else FoldedPowers.of(fold, best)


def column_energies(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares in each of the K columns of some weights (M, K), (K,) float32."""
    return torch.stack([weight.float().square().sum(0).cpu() for weight in weights]).sum(0)


def _error(
    inputs: ChannelRanges,
    energies: torch.Tensor,
    moments: torch.Tensor,
    weights: Sequence[torch.Tensor],
    exponents: torch.Tensor,
) -> float:
    """Return the expected squared error of a token's outputs, if inputs and weights are rounded to eight bits.

    Args:
        energies: of the columns (K,), before they are multiplied.
        moments: mean squares of the inputs (K,), before they are divided.
        exponents: of the columns (K,).
    """
    powers = torch.exp2(exponents.float())
    of_inputs = inputs.together(energies * powers.square(), exponents).error()
    largest = [(weight * powers.to(weight)).abs().amax(1).float() for weight in weights]
    steps = sum(float((rows / CODES).square().sum()) for rows in largest)
    return of_inputs + steps / 12 * float((moments / powers.square()).sum())
