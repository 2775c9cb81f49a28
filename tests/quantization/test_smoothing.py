"""Smoothing: powers of two move from inputs into weights, and the model computes the same bits."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.config.catalog import Need
from pipeline.quantization.calibration import collect as collecting
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.collect import Sums, collect
from pipeline.quantization.calibration.folds import LARGEST_EXPONENT, LARGEST_IN_HALF, find_folds, largest_exponent
from pipeline.quantization.equivalences.folding import Fold, FoldedPowers
from pipeline.quantization.equivalences.smoothing import LOWEST_EXPONENT, column_energies, smoothed
from pipeline.quantization.input_range import ChannelRanges
from pipeline.system.hardware import COMPUTE_DTYPE
from tests.support.architectures import build

IDS = torch.arange(24).unsqueeze(0)
ALL = ("o_proj", "down_proj", "q_proj", "gate_proj")
# Architecture -> the first layers of the folds in a block. Gemma's norms multiply with 1 + weight.
FOLDS = {
    "llama": ALL,
    "qwen2": ALL,
    "qwen3": ALL,
    "gemma3_text": ("o_proj", "down_proj"),
    "opt": ("fc1", "fc2", "out_proj", "q_proj"),
    "gpt_neo": ("q_proj", "c_fc", "out_proj"),
}


def folds_of(folder, block=0):
    model, sums = BlockwiseModel(folder), Sums(Need.SECOND_MOMENTS)
    with model.embedding():
        hidden = model.enter(IDS)
    with model.loaded(block):
        sums.begin()
        model.run(block, IDS, hidden, sums.add)
        return find_folds(model, block, sums.together(), IDS, hidden)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FOLDS)
def test_folds_are_found_in_any_architecture(kind, dtype, tiny_model, monkeypatch):
    monkeypatch.setenv(COMPUTE_DTYPE, dtype)
    found = {fold.consumers[0].split(".")[-2] for fold in folds_of(tiny_model(kind))}
    assert found == set(FOLDS[kind])


@pytest.mark.parametrize("kind", FOLDS)
def test_folded_model_gives_the_same_bits(kind, tiny_model, tmp_path):
    source, folded = tiny_model(kind), tmp_path / "folded"
    powers, draw = FoldedPowers(), torch.Generator().manual_seed(1)
    for block in range(2):
        for fold in folds_of(source, block):
            powers |= FoldedPowers.of(fold, torch.randint(-4, 5, (fold.rows,), generator=draw))
    shutil.copytree(source, folded)
    weights = load_file(source / "model.safetensors")
    changed = {name: powers.apply(name, rows, 0).contiguous() for name, rows in weights.items()}
    assert sum(not torch.equal(changed[name], weights[name]) for name in weights) >= 4
    save_file(changed, folded / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(IDS).logits for folder in (source, folded)
        ]
        assert torch.equal(*logits)


def rounded(values, dim):
    """Return values in eight bits with one scale for each row, or for all."""
    scale = values.abs().amax(dim, keepdim=True) / 127.5
    return (values / scale).round().clamp(-128, 127) * scale


def powers_for(inputs, weight):
    """Return the exponents of the columns of one weight after a norm."""
    fold = Fold(("norm.weight",), ("a.weight",), torch.arange(inputs.shape[1]))
    moments, energies = inputs.square().mean(0), column_energies([weight])
    return smoothed(fold, ChannelRanges.of(inputs), moments, [weight], energies, LARGEST_EXPONENT)


def test_smoothing_lowers_the_error_of_outputs_with_large_channels():
    torch.manual_seed(0)
    inputs, weight = torch.randn(256, 64), torch.randn(32, 64)
    inputs[:, 5] *= 200
    powers = powers_for(inputs, weight)
    assert powers.multiplied["a.weight"].argmax() == 5
    expected = inputs @ weight.T

    def error(inputs, weight):
        return float((rounded(inputs, (0, 1)) @ rounded(weight, 1).T - expected).square().mean())

    divided = inputs / torch.exp2(powers.divided["norm.weight"].float())
    assert error(divided, powers.apply("a.weight", weight, 0)) < error(inputs, weight) / 20


@pytest.mark.parametrize("silent", [1, 20, 40])
def test_channels_that_were_always_zero_stay_as_they_are_and_change_no_others(silent):
    torch.manual_seed(0)
    inputs, weight = torch.randn(256, 64), torch.randn(32, 64)
    inputs[:, 5] *= 200
    inputs[:, 64 - silent :] = 0
    exponents = powers_for(inputs, weight).multiplied["a.weight"]
    assert not exponents[64 - silent :].any() and 3 <= exponents[5] <= 7
    assert exponents.min() >= LOWEST_EXPONENT


def test_inputs_without_large_channels_stay_as_they_are():
    inputs = torch.ones(8, 64) * torch.randn(8, 1).sign()
    assert not powers_for(inputs, torch.ones(32, 64) * torch.randn(32, 1)).names
    assert not powers_for(torch.zeros(8, 64), torch.ones(32, 64)).names


@pytest.mark.parametrize("clip, is_smoothed", [(None, True), (0.05, False)])
def test_values_that_a_block_clamps_are_not_divided(tmp_path, clip, is_smoothed):
    model = build("olmo", clip_qkv=clip)
    model.model.layers[0].self_attn.v_proj.weight.data[3] *= 50
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    (first, *_) = collect(BlockwiseModel(tmp_path), [IDS[0].tolist()] * 2, Need.SECOND_MOMENTS, ranges=True)
    assert any("v_proj" in name for name in first.smoothing.divided) == is_smoothed


def test_folds_are_dropped_if_the_block_then_gives_something_else(tiny_model, monkeypatch):
    """Some tokens of the text may reach a clamp that those of the trial do not."""
    monkeypatch.setattr(collecting, "computes_the_same", lambda *_: False)
    model = BlockwiseModel(tiny_model("llama"))
    (first, *_) = collect(model, [IDS[0].tolist()] * 2, Need.SECOND_MOMENTS, ranges=True)
    assert not first.smoothing.names
    assert all(of.range is not None for of in first.statistics.values())


def test_block_with_a_layer_that_was_not_reached_has_no_folds(tiny_model):
    model, together = BlockwiseModel(tiny_model("llama")), []
    with model.embedding():
        hidden = model.enter(IDS)
    with model.loaded(0):
        together = [(name,) for name in model.weights_of(0)]
        assert find_folds(model, 0, together, IDS, hidden)
        assert find_folds(model, 0, together[1:], IDS, hidden) == []


def test_exponents_are_smaller_if_weights_are_stored_in_float16(tiny_model):
    for dtype, largest in (("bfloat16", LARGEST_EXPONENT), ("float16", LARGEST_IN_HALF)):
        model = BlockwiseModel(tiny_model("llama", dtype=dtype))
        assert largest_exponent(model, model.weights_of(0)) == largest


def test_heads_that_share_values_get_one_exponent(tiny_model):
    (fold,) = (fold for fold in folds_of(tiny_model("llama")) if fold.consumers[0].endswith("o_proj.weight"))
    rows = fold.rows
    assert rows < len(fold.row_of_column) and fold.producer[0].endswith("v_proj.weight")
    exponents = torch.arange(rows) % 5
    columns = FoldedPowers.of(fold, exponents).multiplied[fold.consumers[0]]
    assert torch.equal(columns, exponents[fold.row_of_column].to(torch.int8))
    assert fold.largest(torch.arange(len(fold.row_of_column))).argmax() == rows - 1


def test_layers_with_one_input_keep_one_object_of_statistics(tiny_model):
    (first, *_) = collect(BlockwiseModel(tiny_model("llama")), [IDS[0].tolist()] * 2, Need.GRAM_MATRIX, ranges=True)
    divided = first.smoothing.divide(first.statistics)
    query, key = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert first.statistics[query] is first.statistics[key] and divided[query] is divided[key]
    for name, exponents in first.smoothing.multiplied.items():
        powers = torch.exp2(exponents.float())
        before, after = first.statistics[name], divided[name]
        torch.testing.assert_close(after.second_moments, before.second_moments / powers**2)
        torch.testing.assert_close(after.gram, before.gram / powers / powers.unsqueeze(1))
