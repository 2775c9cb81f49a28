"""Ranges of inputs: the scale that loses least, found from counts alone."""

from __future__ import annotations

import pytest
import torch

from pipeline.quantization.calibration.store import (
    powers_as_tensors,
    powers_from,
    statistics_as_tensors,
    statistics_from,
)
from pipeline.quantization.equivalences.folding import Fold, FoldedPowers
from pipeline.quantization.input_range import CODES, ChannelRanges, InputRange
from pipeline.quantization.statistics import Statistics


def loss(inputs: torch.Tensor, scale: float) -> float:
    """Return the mean squared error of inputs in eight bits."""
    return float(((inputs / scale).round().clamp(-128, 127) * scale - inputs).square().mean())


def range_of(inputs: torch.Tensor) -> InputRange:
    """Return the range of inputs whose channels count alike."""
    return ChannelRanges.of(inputs).together(torch.ones(inputs.shape[1]))


def kinds() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(512, 64)
    return {
        "normal": normal,
        "heavy": normal * torch.randn(512, 64).exp(),
        "an outlier": torch.cat([normal, torch.full((1, 64), 100.0)]),
        "small": normal * 1e-4,
        "uniform": torch.rand(512, 64),
    }


@pytest.mark.parametrize("kind", kinds())
def test_scale_loses_almost_as_little_as_the_best_one(kind):
    inputs = kinds()[kind]
    found = range_of(inputs)
    largest = float(inputs.abs().max())
    best = min(loss(inputs, largest * share / 100 / CODES) for share in range(5, 101))
    assert loss(inputs, found.scale()) < 1.05 * best
    assert loss(inputs, found.scale()) <= loss(inputs, largest / CODES) * 1.01


def test_heavy_tails_are_clipped_and_short_ones_are_not():
    assert range_of(kinds()["heavy"]).scale() * CODES < 0.9 * float(kinds()["heavy"].abs().max())
    assert range_of(kinds()["uniform"]).scale() * CODES > 0.95


def test_parts_add_up_to_the_whole():
    inputs = kinds()["heavy"]
    whole, parts = ChannelRanges.of(inputs), ChannelRanges.of(inputs[:100]).plus(ChannelRanges.of(inputs[100:]))
    assert torch.equal(whole.counts, parts.counts) and torch.equal(whole.largest, parts.largest)
    assert whole.tokens == parts.tokens == 512
    assert whole.counts.sum() == inputs.numel()


def test_divided_channels_have_the_range_of_the_divided_inputs():
    inputs, exponents = kinds()["heavy"], torch.arange(64) % 7 - 3
    found = ChannelRanges.of(inputs).together(torch.ones(64), exponents)
    divided = range_of(inputs / torch.exp2(exponents.float()))
    torch.testing.assert_close(found.counts, divided.counts, atol=2, rtol=0)  # logarithms at the border of a bin
    assert found.largest == divided.largest and found.scale() == divided.scale()


def test_channels_count_as_much_as_their_energy():
    inputs = torch.cat([torch.randn(512, 1), 100 * torch.randn(512, 1)], dim=1)
    ranges = ChannelRanges.of(inputs)
    fine, coarse = ranges.together(torch.tensor([1e6, 1e-6])), ranges.together(torch.ones(2))
    assert fine.scale() < coarse.scale() / 10
    assert fine.scale() * CODES > 2  # of the channel that counts


def test_inputs_of_zero_get_a_usable_scale():
    assert range_of(torch.zeros(4, 8)).scale() == 1.0


def test_ranges_are_read_back_as_they_were_written():
    found = range_of(kinds()["heavy"])
    made = {"a.weight": Statistics(512, torch.ones(64), range=found), "b.weight": Statistics(8, torch.ones(4))}
    again = statistics_from(statistics_as_tensors(made))
    assert again["a.weight"].range.scale() == found.scale() and again["b.weight"].range is None


def test_smoothing_is_read_back_as_it_was_written():
    fold = Fold(("norm.weight", "norm.bias"), ("a.weight",), torch.arange(4))
    powers = FoldedPowers.of(fold, torch.tensor([1, -2, 0, 3]))
    again = powers_from(powers_as_tensors(powers))
    assert again.divided.keys() == powers.divided.keys() and again.multiplied.keys() == {"a.weight"}
    assert torch.equal(again.multiplied["a.weight"], torch.tensor([1, -2, 0, 3], dtype=torch.int8))
