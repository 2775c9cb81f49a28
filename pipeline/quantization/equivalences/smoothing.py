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

from pipeline.quantization.equivalences.folding import Fold, FoldedPowers
from pipeline.quantization.input_range import CODES, ChannelRanges

SHARES = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)  # of the inputs' range that weights take over
LOWEST_EXPONENT = -2  # a channel that is small on calibration text may be larger on other text
SMALLEST = 1e-5  # for logarithms
_ROWS = 1024  # of a weight that are squared at a time


def smoothed(
    fold: Fold,
    inputs: ChannelRanges,
    second_moments: torch.Tensor,
    weights: Sequence[torch.Tensor],
    energies: torch.Tensor,
    highest: int,
) -> FoldedPowers:
    """Return the powers of a fold that lower the expected error of its layers' outputs most; no powers if none does.

    Args:
        fold: the fold.
        inputs: the ranges of the K channels of the inputs.
        second_moments: mean squares of the inputs, (K,).
        weights: of the consumers, (M, K) each, in any floating type.
        energies: of their columns, (K,), see `column_energies`.
        highest: the largest exponent.
    """
    columns = torch.stack([weight.abs().amax(0).float().cpu() for weight in weights]).amax(0)
    sizes = fold.largest(inputs.largest)
    large, heavy = (values.clamp(min=SMALLEST).log2() for values in (sizes, fold.largest(columns)))
    is_live, moments = sizes > 0, second_moments.cpu()  # nothing is known about a channel that was always zero
    unchanged = torch.zeros(fold.rows, dtype=torch.int8)
    best, least = None, _error(inputs, energies, moments, weights, unchanged[fold.row_of_column])
    if not is_live.any():
        return FoldedPowers()
    for share in SHARES:
        wanted = share * large - (1 - share) * heavy
        wanted = (wanted - wanted[is_live].median()).round().clamp(LOWEST_EXPONENT, highest)
        exponents = torch.where(is_live, wanted, 0).to(torch.int8)
        found = _error(inputs, energies, moments, weights, exponents[fold.row_of_column])
        if found < least:
            best, least = exponents, found
    return FoldedPowers() if best is None else FoldedPowers.of(fold, best)


def column_energies(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares in each of the K columns of some weights (M, K), (K,) float32."""
    parts = (rows for weight in weights for rows in weight.split(_ROWS))
    return torch.stack([rows.float().square().sum(0).cpu() for rows in parts]).sum(0)


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
