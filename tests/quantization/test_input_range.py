"""Ranges of inputs: the scale that loses least, found from counts alone."""

from __future__ import annotations

import pytest
import torch

from pipeline.quantization.calibration.store import statistics_as_tensors, statistics_from
from pipeline.quantization.input_range import CODES, InputRange
from pipeline.quantization.statistics import Statistics


def loss(inputs: torch.Tensor, scale: float) -> float:
    """Return the mean squared error of inputs in eight bits."""
    return float(((inputs / scale).round().clamp(-128, 127) * scale - inputs).square().mean())


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
    found = InputRange.of(inputs)
    largest = float(inputs.abs().max())
    best = min(loss(inputs, largest * share / 100 / CODES) for share in range(5, 101))
    assert loss(inputs, found.scale()) < 1.05 * best
    assert loss(inputs, found.scale()) <= loss(inputs, largest / CODES) * 1.01


def test_heavy_tails_are_clipped_and_short_ones_are_not():
    assert InputRange.of(kinds()["heavy"]).scale() * CODES < 0.9 * float(kinds()["heavy"].abs().max())
    assert InputRange.of(kinds()["uniform"]).scale() * CODES > 0.95


def test_parts_add_up_to_the_whole():
    inputs = kinds()["heavy"]
    whole, parts = InputRange.of(inputs), InputRange.of(inputs[:100]).plus(InputRange.of(inputs[100:]))
    assert torch.equal(whole.counts, parts.counts) and whole.largest == parts.largest
    assert whole.counts.sum() == inputs.numel()


def test_inputs_of_zero_get_a_usable_scale():
    assert InputRange.of(torch.zeros(4, 8)).scale() == 1.0


def test_ranges_are_read_back_as_they_were_written():
    found = InputRange.of(kinds()["heavy"])
    made = {"a.weight": Statistics(512, torch.ones(64), range=found), "b.weight": Statistics(8, torch.ones(4))}
    again = statistics_from(statistics_as_tensors(made))
    assert again["a.weight"].range.scale() == found.scale() and again["b.weight"].range is None
