"""Calibration block by block gives the statistics that the whole model gives."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.catalog import Need
from pipeline.data.encode import Encoded
from pipeline.errors import DataError, ModelError
from pipeline.models.matrices import linear_weights
from pipeline.quantization.calibration import collect as collecting
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.check import check_blocks
from pipeline.quantization.calibration.collect import Sums, collect
from pipeline.quantization.calibration.text import check_apart, windows_of, without_shared
from tests.support.architectures import build

# Sliding and full attention, positions that some layers do not have, learned positions, biases, tied tables.
MODELS = ("llama", "qwen3", "smollm3", "gemma3_text", "opt", "gpt_neo")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Compute in float32, so that both ways differ only by the order of sums."""
    monkeypatch.setenv("TUNEPRESS_COMPUTE_DTYPE", "float32")


def whole_model(folder, windows):
    """Return the Gram matrix of each layer's inputs, from one pass of the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def hook(name):
        def add(_, given):
            inputs = given[0].reshape(-1, given[0].shape[-1])
            sums[name] = sums.get(name, 0) + inputs.T @ inputs

        return add

    for name in linear_weights(folder):
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for window in windows:
            model(input_ids=torch.tensor([window]))
    return {name: total / sum(map(len, windows)) for name, total in sums.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_statistics_are_those_of_the_whole_model(kind, tiny_model, monkeypatch):
    monkeypatch.setattr(collecting, "BATCH_TOKENS", 96)  # several batches, one of them of one window
    torch.manual_seed(0)
    windows = torch.randint(0, 255, (5, 48)).tolist()
    expected = whole_model(tiny_model(kind), windows)
    found = {}
    for block in collect(BlockwiseModel(tiny_model(kind)), windows, Need.GRAM_MATRIX):
        found |= block.statistics
    assert found.keys() == expected.keys()
    for name, gram in expected.items():
        scale = gram.diagonal().mean()
        assert (found[name].gram - gram).abs().max() < 1e-4 * scale, name
        assert torch.equal(found[name].gram.diagonal(), found[name].second_moments) and found[name].tokens == 240


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_statistics_are_the_same_on_a_gpu(tiny_model):
    torch.manual_seed(0)
    windows, found = torch.randint(0, 255, (5, 48)).tolist(), {}
    for device in ("cpu", "cuda"):
        for block in collect(BlockwiseModel(tiny_model("llama"), device=device), windows, Need.GRAM_MATRIX):
            found.setdefault(device, {}).update({name: of.gram.cpu() for name, of in block.statistics.items()})
    for name, gram in found["cpu"].items():
        assert (found["cuda"][name] - gram).abs().max() < 1e-3 * gram.diagonal().mean(), name


# Blocks that return tuples of two or three, among them attention between other kinds of blocks.
@pytest.mark.parametrize("kind", ["bamba", "rwkv", "gpt_neox", "falcon_h1"])
def test_other_architectures_run_block_by_block(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    check_blocks(BlockwiseModel(tmp_path))


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("gemma3n_text", {"num_hidden_layers": 4, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 96}),
        ("gemma4_text", {"num_hidden_layers": 4}),
        ("rwkv", {"num_hidden_layers": 4, "rescale_every": 2}),  # halves what it hands on
    ],
)
def test_blocks_that_get_more_than_the_output_of_the_one_before_are_refused_by_name(kind, changes, tmp_path):
    small = {"vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16}
    build(kind, **(small | kinds if "gemma" in kind else {}), **changes).save_pretrained(tmp_path)
    model = BlockwiseModel(tmp_path)
    with pytest.raises(ModelError, match=r"\w+ForCausalLM: cannot be calibrated block by block \("):
        next(collect(model, [list(range(40))], Need.SECOND_MOMENTS))


def test_tensors_that_the_model_does_not_read_are_left_alone(tiny_model, tmp_path):
    """Old versions stored rotary frequencies, in a module that new ones do not have."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    file = folder / "model.safetensors"
    unread = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    save_file(load_file(file) | unread | {"other.thing": torch.ones(8)}, file, {"format": "pt"})
    windows = [list(range(40))]
    found = list(collect(BlockwiseModel(folder), windows, Need.SECOND_MOMENTS))
    expected = list(collect(BlockwiseModel(tiny_model("llama")), windows, Need.SECOND_MOMENTS))
    assert all(torch.equal(a.activations[0], b.activations[0]) for a, b in zip(found, expected, strict=True))


def test_embedding_may_be_narrower_than_the_blocks(tiny_model):
    model = tiny_model("opt", word_embed_proj_dim=32)
    found = {}
    for block in collect(BlockwiseModel(model), [list(range(40))], Need.SECOND_MOMENTS):
        found |= block.statistics
    outside = {f"model.decoder.project_{way}.weight" for way in ("in", "out")}
    assert linear_weights(model).keys() - found.keys() == outside


def test_layers_share_sums_only_if_their_inputs_are_the_same():
    sums, inputs = Sums(Need.SECOND_MOMENTS), torch.ones(4, 6)
    sums.begin()
    sums.add("first", inputs)
    sums.add("same", inputs.view(4, 6))
    sums.add("a part", inputs[:, :3])
    sums.add("written over", inputs.mul_(2))
    found = sums.statistics()
    assert found["same"] is found["first"] and found["first"].second_moments.tolist() == [1] * 6
    assert found["a part"].second_moments.tolist() == [1] * 3
    assert found["written over"].second_moments.tolist() == [4] * 6


def test_second_moments_need_no_gram_matrix(tiny_model):
    windows = [list(range(40))] * 3
    model = tiny_model("llama")
    full = next(collect(BlockwiseModel(model), windows, Need.GRAM_MATRIX)).statistics
    some = next(collect(BlockwiseModel(model), windows, Need.SECOND_MOMENTS)).statistics
    for name, of in some.items():
        assert of.gram is None
        torch.testing.assert_close(of.second_moments, full[name].second_moments)


def test_one_block_is_in_memory_at_a_time(tiny_model):
    model = BlockwiseModel(tiny_model("llama"))
    layers = model._layers

    def loaded():
        return [not any(p.is_meta for p in layer.parameters()) for layer in layers]

    assert loaded() == [False, False]
    for number in range(2):
        with model.loaded(number):
            assert loaded() == [number == 0, number == 1]
    assert loaded() == [False, False]


def encoded(*tokens: int) -> Encoded:
    return Encoded(list(tokens), list(tokens))


def test_windows_follow_each_other_over_the_borders_of_sequences():
    sequences = [encoded(*range(5)), encoded(*range(5, 12))]
    assert windows_of(sequences, 100, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert windows_of(sequences, 8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="12 tokens, and one window has 16"):
        windows_of(sequences, 100, 16)


def test_text_that_is_measured_on_is_refused():
    text = encoded(*range(200))
    check_apart([text], [encoded(*range(500, 700))], "general")
    with pytest.raises(DataError, match="a part of the general text"):
        check_apart([text], [encoded(*range(600, 650), *range(100, 140))], "general")


def test_training_examples_that_share_a_passage_with_measured_text_are_left_out():
    apart, shared = encoded(*range(200)), encoded(*range(300, 340), *range(500, 540))
    assert without_shared([shared, apart], [encoded(*range(510, 700))]) == [apart]


def test_a_system_prompt_that_both_texts_begin_with_is_no_shared_text():
    prompt = list(range(100))
    train = Encoded([*prompt, *range(200, 240)], [-100] * 100 + list(range(200, 240)))
    held_out = Encoded([*prompt, *range(300, 340)], [-100] * 100 + list(range(300, 340)))
    check_apart([train], [held_out], "held-out")
