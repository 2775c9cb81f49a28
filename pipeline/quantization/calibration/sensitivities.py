"""Sensitivities: the expected loss of each weight on each grid that it may have, without measuring the model.

One pass over the blocks collects second moments of inputs, rounds each weight on its grids, and weights the errors.
One gradient pass then divides the KL divergence among the weights on their base grids (`gradients.shares`). The loss
on another grid is the share times the ratio of the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from pipeline.config.catalog import NEAREST, ROUNDINGS, Need
from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.models.checkpoint.row_blocks import in_parallel
from pipeline.quantization.calibration import gradients
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.collect import collect
from pipeline.quantization.calibration.store import RoundedFolder, RoundedLayers, save_block
from pipeline.quantization.formats import format_of
from pipeline.quantization.grid import Grid, GroupQuantized, joined
from pipeline.quantization.roundings import rounding
from pipeline.quantization.statistics import Statistics

MOMENTS_TOKENS, GRADIENT_TOKENS = 8192, 4096
ROWS = 1024  # of a weight, rounded at a time
SAMPLED_ROWS = 256  # of a weight, to compare its errors on several grids

Tell = Callable[[int, int, str], None]
Shapes = Mapping[str, tuple[int, int]]


class Heads(Protocol):
    """The output heads of a full-precision model and of rounded ones."""

    @property
    def weight(self) -> str:
        """Return the name of the output matrix, which may be the embedding's."""

    def of(self, rounded: gradients.Rounded) -> tuple[gradients.OutputHead, gradients.OutputHead]:
        """Return the head in full precision, and the rounded one."""


@dataclass(frozen=True)
class Sensitivities:
    """Losses of weights, as plain data for the ledger.

    Attributes:
        shares: name -> share of the KL divergence on the base grid, in nats a token.
        errors: name -> grid, as `key` names it -> its weighted error, as a multiple of that on the base grid.
        fused: names of the weights of layers with the same input.
    """

    shares: dict[str, float]
    errors: dict[str, dict[str, float]]
    fused: list[list[str]]

    def loss(self, name: str, bits: int, group_size: int | None) -> float:
        """Return the expected loss of a weight, in nats a token; never negative."""
        return max(0.0, self.shares.get(name, 0.0)) * self.errors.get(name, {}).get(key(bits, group_size), 1.0)


def key(bits: int, group_size: int | None) -> str:
    """Return the name of a grid in `Sensitivities.errors`."""
    return f"{bits}/{group_size or 'row'}"


def grids_to_mix(spec: VariantSpec, linear: Shapes) -> dict[str, list[Grid]]:
    """Return the grids that a variant with mixed layers has for each weight; the first is the base grid, the finest."""
    form = format_of(spec)
    found = {}
    for name, (_, width) in linear.items():
        sizes = [size for size in sorted(spec.variant.group_sizes) if width % size == 0]
        low = [form.grid(spec.model_copy(update={"group_size": size}), width) for size in sizes]
        found[name] = [grid for grid in low if grid is not None] + [form.TABLE]
    return found


def measure(
    model: BlockwiseModel,
    spec: VariantSpec,
    calibrates: bool,
    grids: Mapping[str, Sequence[Grid]],
    tables: Shapes,
    windows: Sequence[list[int]],
    heads: Heads,
    folder: Path,
    tell: Tell,
) -> Sensitivities:
    """Measure the sensitivities of a model's weights.

    Args:
        calibrates: the variant will be calibrated.
        grids: name of a linear weight -> its base grid, then others.
        tables: the embedding and the output head, if they can be quantized; their base grid has eight bits.
        windows: calibration text, as windows of token ids.
        heads: for the gradient pass.
        folder: empty; the weights on their base grids, and activations, are there meanwhile.
        tell: called with blocks done, of how many, and what.

    Returns:
        The sensitivities. Weights that the text never reached are in none of their parts.

    Raises:
        QuantizationError: if the text reaches no weight.
    """
    how, uses_moments, gain = stand_in(spec, calibrates)
    base: dict[str, Grid] = {}
    errors: dict[str, dict[str, float]] = {}
    fused: list[list[str]] = []
    for block in collect(model, first_of(windows, MOMENTS_TOKENS), Need.SECOND_MOMENTS):
        here = {name: of for name, of in block.statistics.items() if name in grids}
        made: dict[str, GroupQuantized] = {}

        def work(name: str, of: Statistics, made: dict[str, GroupQuantized] = made) -> int:
            weight, of = model.weight(name), Statistics(of.tokens, of.second_moments.cpu())
            known = of if uses_moments else None
            made[name] = _round(spec, how, weight, grids[name][0], known)
            errors[name] = _relative_errors(spec, how, weight, grids[name], known, of.second_moments)
            return weight.numel()

        largest = sorted(here, key=lambda name: -math.prod(model.linear[name]))
        in_parallel([partial(work, name, here[name]) for name in largest], 0)
        base |= {name: grids[name][0] for name in here}
        by_input: dict[int, list[str]] = {}
        for name, statistics in here.items():
            by_input.setdefault(id(statistics), []).append(name)
        fused += by_input.values()
        save_block(folder, block.block, made)
        tell(block.block + 1, model.count, "comparing grids")
    if not base:
        raise QuantizationError(f"{spec.name}: the calibration text reaches no layer that can be quantized")
    eight = format_of(spec).TABLE
    for number, name in enumerate(tables):
        save_block(folder, model.count + number, {name: rounding(NEAREST).round(model.weight(name), eight)})
        base[name] = eight
    shapes = {**model.linear, **tables}
    rounded = RoundedLayers(RoundedFolder(folder), {name: (shapes[name], grid) for name, grid in base.items()})

    def told(done: int, total: int) -> None:
        tell(done, total, "sharing the loss among layers")

    some = first_of(windows, GRADIENT_TOKENS)
    head = heads.weight if heads.weight in rounded else None
    found = gradients.shares(model, heads.of(rounded), rounded, some, folder, told, head)
    shares = {name: share * (1.0 if base[name] == eight else gain) for name, share in found.by_weight.items()}
    return Sensitivities(shares, errors, fused)


def first_of(windows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Return the first windows that have at most so many tokens; at least one."""
    ends = accumulate(map(len, windows))
    return [window for window, end in zip(windows, ends, strict=True) if end <= max(tokens, len(windows[0]))]


def stand_in(spec: VariantSpec, calibrates: bool) -> tuple[str, bool, float]:
    """Return how weights are rounded for an estimate.

    A rounding that needs whole matrices of the inputs takes too long for that.

    Returns:
        The name of the rounding, whether it uses second moments, and the factor for its losses.
    """
    asked, need = ROUNDINGS[str(spec.rounding)], spec.need(calibrates)
    if need == Need.GRAM_MATRIX:
        quick = next(r for r in ROUNDINGS.values() if r.uses == Need.SECOND_MOMENTS and spec.variant.zero in r.zeros)
        return quick.name, True, asked.gain
    return asked.name, need == Need.SECOND_MOMENTS, 1.0


def _round(
    spec: VariantSpec, how: str, weight: torch.Tensor, grid: Grid, statistics: Statistics | None
) -> GroupQuantized:
    """Return a weight on a grid; tables of other bits than the variant are rounded to nearest, as the writer does."""
    if grid.bits != spec.variant.bits and grid == format_of(spec).TABLE:
        return rounding(NEAREST).round(weight, grid)
    return joined([rounding(how).round(rows, grid, statistics) for rows in weight.split(ROWS)])  # to save memory


def _relative_errors(
    spec: VariantSpec,
    how: str,
    weight: torch.Tensor,
    grids: Sequence[Grid],
    statistics: Statistics | None,
    moments: torch.Tensor,
) -> dict[str, float]:
    """Return the weighted error on each grid, as a multiple of that on the first, over a sample of the rows."""
    rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)]
    found = {}
    for grid in grids:
        off = _round(spec, how, rows, grid, statistics).dequantize() - rows.float()
        found[key(grid.bits, grid.group_size)] = float((off.square().sum(0) * moments).sum())
    first = next(iter(found.values())) or 1.0
    return {name: error / first for name, error in found.items()}
