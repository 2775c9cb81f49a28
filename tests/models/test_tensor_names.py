"""Tensors of a checkpoint beside those of its model: renamed as transformers renames them, or refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.schema import Model, VariantSpec
from pipeline.errors import ModelError
from pipeline.models import tensor_names
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.models.safe_loading import open_model
from pipeline.models.sources import fetch
from pipeline.models.tensor_names import open_checkpoint
from pipeline.quantization.writer import quantize_checkpoint
from tests.support.checkpoints import rewrite, unprefixed
from tests.support.models import ARCHITECTURES

LOST = {
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "norm of a block": "model.layers.1.post_attention_layernorm.weight",
    "embedding": "model.embed_tokens.weight",
    "bias": "model.layers.0.self_attn.k_proj.bias",
    "layer": "model.layers.0.mlp.up_proj.weight",
}


@pytest.fixture(params=["known", "left to transformers"])
def layouts(request, monkeypatch):
    """Well-known architectures are known, or not."""
    if request.param != "known":
        monkeypatch.setattr(tensor_names, "model_layout", lambda folder: None)


@pytest.mark.parametrize("what", LOST)
def test_a_missing_tensor_is_refused_by_name_before_anything_is_written(tiny_model, tmp_path, layouts, what):
    name, made = LOST[what], tmp_path / "made"
    folder = rewrite(tiny_model("llama"), tmp_path / "base", lambda tensors: tensors.pop(name))
    spec = VariantSpec(name="int8").resolved()
    with pytest.raises(ModelError, match=f"has no '{name}'"):
        quantize_checkpoint(folder, [spec], {"int8": made}, linear_weights(folder))
    assert not made.exists()
    for opened in (lambda: fetch(Model(source=str(folder)), made), lambda: open_model(folder)):
        with pytest.raises(ModelError, match=f"has no '{name}'"):
            opened()


def test_many_missing_tensors_are_counted(tiny_model, tmp_path, layouts):
    def lose(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    folder = rewrite(tiny_model("llama"), tmp_path / "base", lose)
    with pytest.raises(ModelError, match=r"has no 'model\.layers\.1\.input_layernorm.weight', .* and 10 more"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_whole_checkpoints_are_opened_as_they_are(tiny_model, layouts, kind):
    folder = tiny_model(kind)
    assert dict(open_checkpoint(folder)) == dict(Checkpoint(folder))


def test_a_tied_head_may_be_missing_and_a_tied_table_stored_as_the_head_is_the_embedding(tiny_model, tmp_path, layouts):
    source = tiny_model("qwen3")
    assert "lm_head.weight" not in open_checkpoint(source)

    def as_head(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    folder = rewrite(source, tmp_path / "base", as_head)
    found, expected = open_checkpoint(folder), Checkpoint(source)
    assert found.keys() == expected.keys()
    assert torch.equal(found.read("model.embed_tokens.weight"), expected.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_names_of_the_bare_decoder_are_read_as_transformers_reads_them(tiny_model, tmp_path, layouts, kind):
    source = tiny_model(kind)
    folder = rewrite(source, tmp_path / "base", unprefixed)
    theirs, ours = open_model(folder, dtype="auto").state_dict(), open_checkpoint(folder)
    assert ours.keys() == Checkpoint(source).keys()
    assert all(torch.equal(ours.read(name), theirs[name]) for name in ours)

    spec, made = VariantSpec(name="int8").resolved(), {}
    for place in (source, folder):
        made[place] = tmp_path / f"int8 of {place.name}"
        quantize_checkpoint(place, [spec], {"int8": made[place]}, linear_weights(place))
    whole, bare = Checkpoint(made[source]), Checkpoint(made[folder])
    assert whole.keys() == bare.keys()
    assert all(torch.equal(whole.read(name), bare.read(name)) for name in whole)


def test_a_tensor_of_another_shape_than_the_model_has_is_refused(tiny_model, tmp_path, layouts):
    def shorten(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    folder = rewrite(tiny_model("llama"), tmp_path / "base", shorten)
    with pytest.raises(ModelError, match=r"'model.norm.weight' is of \(159,\) .* and of \(160,\) in the model"):
        open_checkpoint(folder)


def test_a_checkpoint_of_single_experts_is_whole_and_keeps_its_names(mixture):
    assert dict(open_checkpoint(mixture)) == dict(Checkpoint(mixture))


def test_names_that_other_programs_know_are_kept_in_a_copy_if_every_layer_is_found_by_them(tmp_path):
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = Checkpoint(tmp_path)
    assert "embed_out.weight" in stored
    assert open_checkpoint(tmp_path, to_copy=True).keys() == stored.keys()
    found = open_checkpoint(tmp_path)
    assert torch.equal(found.read("lm_head.weight"), stored.read("embed_out.weight"))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_tensors_that_the_model_does_not_read_are_told(tiny_model, tmp_path, layouts, kind):
    def add(tensors):
        tensors["model.layers.0.self_attn.gate.weight"] = torch.ones(3)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    said = []
    open_checkpoint(rewrite(tiny_model(kind), tmp_path / "base", add), tell=said.append)
    (line,) = said
    assert "has 'model.layers.0.self_attn.gate.weight', which the model does not read; they are copied" in line
    open_checkpoint(tiny_model(kind), tell=said.append)
    assert said == [line]
