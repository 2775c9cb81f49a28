"""Adapters that cannot be merged are refused by name."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.loader import load_config
from pipeline.errors import CheckpointError, ModelError, StageFailed
from pipeline.models.checkpoint import SINGLE_NAME
from pipeline.models.lora_adapter import Adapter
from pipeline.training.merge import merge_checkpoint
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run_one
from tests.support.adapters import Q, edit
from tests.support.models import VOCABULARY, write_tokenizer
from tests.support.runs import write_place


@pytest.mark.parametrize(
    "values",
    [
        {"fan_in_fan_out": True}, {"layer_replication": [[0, 1]]}, {"ensure_weight_tying": True},
        {"target_parameters": ["x"]}, {"trainable_token_indices": [1]}, {"alora_invocation_tokens": [1]},
        {"use_qalora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(adapter, values):
    (key,) = values
    with pytest.raises(ModelError, match=key):
        Adapter.read(adapter(**values))


@pytest.mark.parametrize(
    "values", [{"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"modules_to_save": None}]
)
def test_harmless_adapter_settings_are_accepted(adapter, values):
    assert len(Adapter.read(adapter(**values)).changes) == 14


@pytest.mark.parametrize(
    "values, said",
    [
        ({"use_dora": True}, "use_dora is True, and .* no lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias is True, and .* no lora_B.bias"),
        ({"rank_pattern": {"q_proj": 8}}, "q_proj.weight' has no factors A and B of rank 8"),
        ({"rank_pattern": {"q_proj": "8"}}, "no rank and alpha for 'model.layers.0.self_attn.q_proj'"),
        ({"rank_pattern": {"q_(proj": 8}}, "no regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern in its adapter_config.json is not a table"),
        ({"peft_type": "IA3"}, "a IA3 adapter; only LoRA"),
        ({"r": 8}, "no factors A and B of rank 8"),
        ({"r": 0}, "no rank and alpha"),
        ({"r": None}, "no rank and alpha"),
        ({"lora_alpha": "many"}, "no rank and alpha"),
    ],
)
def test_other_configurations_are_refused(adapter, values, said):
    with pytest.raises(ModelError, match=said):
        Adapter.read(adapter(**values))


@pytest.mark.parametrize("text", [None, "", "[]", "5", "[" * 100_000, b"\xff\xfe"])
def test_a_folder_that_is_no_adapter_is_refused(adapter, text):
    path = adapter() / "adapter_config.json"
    path.unlink() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match="this is not an adapter"):
        Adapter.read(path.parent)


def test_an_adapter_without_its_weights_is_refused(adapter):
    (adapter() / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: cannot be read"):
        Adapter.read(adapter())


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}),
            "lm_head.weight' is not a LoRA factor",
        ),
        (lambda t: t.update({f"{Q}.bias": torch.ones(160)}), "q_proj.bias' is not a LoRA factor"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(160)}), "use_dora is False"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(160)}), "lora_bias is False"),
        (lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(2, 2)}), "is not a LoRA factor"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj.weight' has no factors A and B of rank 4"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(5, 160)}), "no factors A and B of rank 4"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 160, 1, 1)}), "no factors A and B of rank 4"),
    ],
)
def test_tensors_that_are_not_pairs_of_factors_are_refused_by_name(adapter, change, said):
    edit(adapter(), change)
    with pytest.raises(ModelError, match=said):
        Adapter.read(adapter())


def test_a_table_that_the_base_uses_twice_is_not_replaced_in_one_of_its_places(tiny_model, trained, tmp_path):
    for module, said in (("embed_tokens", "uses twice"), ("lm_head", "changes 'lm_head.weight', which .* not have")):
        base = tiny_model("qwen3")
        with pytest.raises(ModelError, match=said):
            merge_checkpoint(base, trained(base, modules_to_save=[module]), tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def test_tied_table_stored_twice_is_replaced_in_both_places_or_refused(tiny_model, trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    adapter = trained(tiny_model("llama"), target_modules=["q_proj", "lm_head"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="'lm_head.weight', which .* uses twice"):
        merge_checkpoint(base, adapter, tmp_path / "out", "bf16")


@pytest.mark.parametrize("architecture, said", [("qwen3", "made for a"), ("smollm3", "made for a")])
def test_an_adapter_of_another_model_is_refused_by_name(tiny_model, adapter, tmp_path, architecture, said):
    with pytest.raises(ModelError, match=rf"{said} 'model\.layers"):
        merge_checkpoint(tiny_model(architecture), adapter(), tmp_path / "out", "bf16")


def test_a_layer_that_the_base_lacks_is_refused_by_name(tiny_model, adapter, tmp_path):
    def deeper(tensors):
        for half in "AB":
            name = f"{Q}.lora_{half}.weight"
            tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()

    edit(adapter(), deeper)
    with pytest.raises(ModelError, match=r"changes 'model\.layers\.9\.self_attn\.q_proj\.weight'"):
        merge_checkpoint(tiny_model("llama"), adapter(), tmp_path / "out", "bf16")
    assert not (tmp_path / "out" / SINGLE_NAME).exists()


@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_non_finite_values_are_refused_with_their_origin(tiny_model, trained, tmp_path, whose):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    adapter = shutil.copytree(trained(tiny_model("llama")), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors" if whose == "adapter" else base / SINGLE_NAME
    tensors = load_file(path)
    ending = "down_proj.lora_B.weight" if whose == "adapter" else "down_proj.weight"
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    tensors[name][0, 0] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{whose}: makes values of .*down_proj.weight' that are not finite"):
        merge_checkpoint(base, adapter, tmp_path / "out", "bf16")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


@pytest.mark.parametrize(
    ("kind", "shape", "reason"),
    [
        ("gpt2", {"n_embd": 96, "n_layer": 2, "n_head": 4}, "the adapter uses fan_in_fan_out"),
        ("bloom", {"hidden_size": 96, "n_layer": 2, "n_head": 4}, "uses twice, as embedding and as output head"),
    ],
)
def test_model_whose_adapter_could_not_be_merged_is_refused_before_training(tmp_path, monkeypatch, kind, shape, reason):
    model = tmp_path / "model"
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=258, **shape)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(model)
    write_tokenizer(model)
    place = write_place(tmp_path, model, train={"method": "lora", "packing": False}, quantize={"variants": []})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageFailed, match=f"an adapter for it could not be merged: .*{reason}"):
        run_one(load_config(str(place.config)), "train", start=run_stage_here)
    assert '"metrics"' not in place.run_folder.joinpath("events.jsonl").read_text()  # no step was made


def test_name_that_no_layer_has_is_refused_before_training(tmp_path, monkeypatch, tiny_model):
    place = write_place(tmp_path, tiny_model("llama"), train={"lora": {"target_modules": ["q_proj", "nothing"]}})
    monkeypatch.chdir(tmp_path)
    refused = "no linear layer of the model is 'nothing'. Try: down_proj, gate_proj"
    with pytest.raises(StageFailed, match=refused):
        run_one(load_config(str(place.config)), "train", start=run_stage_here)
