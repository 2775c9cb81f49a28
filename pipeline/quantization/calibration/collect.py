"""Statistics of the inputs of linear layers, collected block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.config.catalog import Need
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.check import check_blocks
from pipeline.quantization.calibration.folds import computes_the_same, find_folds, largest_exponent
from pipeline.quantization.equivalences.folding import FoldedPowers
from pipeline.quantization.equivalences.smoothing import column_energies, smoothed
from pipeline.quantization.input_range import ChannelRanges
from pipeline.quantization.statistics import Statistics

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Collected:
    """The statistics and the outputs of a block.

    Attributes:
        block: its number.
        statistics: of its linear layers, by the name of the weight.
        activations: its outputs (B, T, H), one tensor for each batch, which are the inputs of the next block.
        smoothing: the powers of two that the ranges of its inputs are divided by.
    """

    block: int
    statistics: dict[str, Statistics]
    activations: list[torch.Tensor]
    smoothing: FoldedPowers = FoldedPowers()


def collect(
    model: BlockwiseModel,
    windows: Sequence[list[int]],
    need: Need,
    first: int = 0,
    activations: list[torch.Tensor] | None = None,
    ranges: bool = False,
) -> Iterator[Collected]:
    """Yield what each block gives, in order.

    Args:
        model: the full-precision model.
        windows: calibration text, as windows of token ids.
        need: whether Gram matrices are collected too.
        first: the first block to run.
        activations: its inputs; None to begin with the embedding.
        ranges: whether inputs are smoothed, and their ranges collected.

    Raises:
        ModelError: if the architecture cannot be run block by block.
    """
    batches = batches_of(windows)
    if activations is None:
        check_blocks(model)
        with model.embedding():
            activations = [model.enter(ids) for ids in batches]
    activations = [hidden.to(model.device) for hidden in activations]
    for block in range(first, model.count):
        # No name here may hold what was collected, or it would stay in memory until the next block is done.
        yield _collected(model, block, batches, activations, need, ranges)


def _collected(
    model: BlockwiseModel,
    block: int,
    batches: Sequence[torch.Tensor],
    activations: list[torch.Tensor],
    need: Need,
    ranges: bool,
) -> Collected:
    """Run a block on all batches, and return what it gives.

    Args:
        activations: its inputs (B, T, H), which its outputs replace.
    """
    sums, entered = Sums(need, ranges), activations[0]
    with model.loaded(block):
        for number, ids in enumerate(batches):
            sums.begin()
            activations[number] = model.run(block, ids, activations[number], sums.add)
        sums.begin()
        found = sums.statistics()
        if not ranges:
            return Collected(block, found, activations)
        together = sums.together()
        energies = {names[0]: column_energies(_weights(model, names)) for names in together}
        powers = FoldedPowers()
        for fold in find_folds(model, block, together, batches[0], entered):
            first, highest = fold.consumers[0], largest_exponent(model, (*fold.producer, *fold.consumers))
            weights, moments = _weights(model, fold.consumers), found[first].second_moments
            powers |= smoothed(fold, sums.ranges(first), moments, weights, energies[first], highest)
        if not computes_the_same(model, block, batches[0], entered, activations[0], powers):
            powers = FoldedPowers()  # the block clamps values that folds change
    for first, *others in together:
        exponents = powers.multiplied.get(first)
        energy = energies[first] if exponents is None else energies[first] * exponents.float().exp2().square()
        ranged = replace(found[first], range=sums.ranges(first).together(energy, exponents))
        found |= dict.fromkeys((first, *others), ranged)
    return Collected(block, found, activations, powers)


def _weights(model: BlockwiseModel, names: Sequence[str]) -> list[torch.Tensor]:
    """Return weights of a loaded block."""
    return [model.skeleton.get_parameter(name).data for name in names]


class Sums:
    """Sums over tokens of the inputs of several layers; layers with the same input share them."""

    def __init__(self, need: Need, ranges: bool = False):
        self._need, self._has_ranges = need, ranges
        self._ranges: dict[str, ChannelRanges] = {}
        self._leader: dict[str, str] = {}  # name -> the first layer with the same input
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        # Inputs of this forward pass, and their versions; they are kept so that none has another's place.
        self._seen: list[tuple[torch.Tensor, int, str]] = []

    def begin(self) -> None:
        """Begin another forward pass."""
        self._seen = []

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add the inputs (T, K) of a layer."""
        same = (leader for other, version, leader in self._seen if _is_same(other, version, inputs))
        leader = self._leader.setdefault(name, next(same, name))
        if leader != name:
            return
        self._seen.append((inputs, inputs._version, name))
        wide = inputs.float()
        if self._need != Need.GRAM_MATRIX:
            self._sums[name] = self._sums.get(name, 0) + wide.square().sum(0)
        elif name in self._sums:
            self._sums[name].addmm_(wide.T, wide)  # a product of its own would be as large as the sum
        else:
            self._sums[name] = wide.T @ wide
        self._tokens[name] = self._tokens.get(name, 0) + len(wide)
        if self._has_ranges:
            found = ChannelRanges.of(wide)
            self._ranges[name] = self._ranges[name].plus(found) if name in self._ranges else found

    def statistics(self) -> dict[str, Statistics]:
        """Return the statistics of every layer."""
        found: dict[str, Statistics] = {}
        for name, leader in self._leader.items():
            if leader != name:
                found[name] = found[leader]
                continue
            tokens = self._tokens[name]
            means = self._sums.pop(name).div_(tokens)
            is_gram = means.ndim == 2
            moments, gram = (means.diagonal().clone(), means) if is_gram else (means, None)
            found[name] = Statistics(tokens, moments, gram)
        return found

    def ranges(self, name: str) -> ChannelRanges:
        """Return the ranges of the inputs of the first layer that has them."""
        return self._ranges[name]

    def together(self) -> list[tuple[str, ...]]:
        """Return the names of the layers, those with the same input in one item."""
        leaders = dict.fromkeys(self._leader.values())
        return [tuple(name for name, of in self._leader.items() if of == leader) for leader in leaders]


def _is_same(known: torch.Tensor, version: int, inputs: torch.Tensor) -> bool:
    """Return True if two views have the same elements, and nothing was written into them in between."""
    return inputs.is_set_to(known) and inputs._version == version


def batches_of(windows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return batches (B, T) of consecutive windows of one length."""
    found: list[torch.Tensor] = []
    group: list[list[int]] = []
    for window in windows:
        if group and (len(window) != len(group[0]) or (len(group) + 1) * len(window) > BATCH_TOKENS):
            found.append(torch.tensor(group))
            group = []
        group.append(window)
    return [*found, torch.tensor(group)] if group else found
