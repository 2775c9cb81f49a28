"""Training with quantization: the weights of each step are those that the variant stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.config.catalog import CALIBRATED, fitting_group_size
from pipeline.config.loader import dump_config, load_config, parse_config
from pipeline.config.schema import Config
from pipeline.config.training_catalog import TRAINERS
from pipeline.data.encode import Encoded, EncodedSet
from pipeline.errors import ConfigError, ModelError, UserError
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.formats import format_of_file, stored_weights
from pipeline.quantization.formats.torchao.format import grouped
from pipeline.quantization.roundings import rtn
from pipeline.quantization.writer import Variants
from pipeline.training import fused_layers, qat
from pipeline.training.fused_layers import is_plain_adapter
from pipeline.training.fused_loss import fuse_training_step
from pipeline.training.merge import merge_checkpoint
from pipeline.training.qat import check_model, merge_dtype, quantize_in_training, trained_for
from pipeline.training.trainers import Job, merge_bases
from pipeline.training.trainers.sft import build
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run_one
from pipeline.workflow.stages import train
from pipeline.workflow.workspace import Workspace
from tests.support.adapters import base_model
from tests.support.runs import stage_process_of, wait_for_training, write_place
from tests.training.test_fused_layers import adapted
from tests.training.test_preference import PAIRS, STEPS, write_pairs

INT4 = {"name": "int4", "group_size": 32, "keep": ["model.layers.0.self_attn.o_proj"], "embeddings": "int8"}


def config_for(variant, variants=None, **settings):
    given = {"qat": variant, "max_steps": 2, "batch_size": 2, "accumulate": 1, "max_length": 48, "learning_rate": 0.02}
    return Config.model_validate(
        {
            "name": "quantized",
            "model": {"source": "unused"},
            "data": {"source": "unused"},
            "train": {**given, "lora": {"rank": 4}, "checkpoint_every": 2, **settings},
            "quantize": {"variants": variants or [variant]},
        }
    )


def trainer_for(config, folder, output):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (40,), generator=draw).tolist() for _ in range(8)]
    encoded = EncodedSet([Encoded(ids, [-100, *ids[1:]]) for ids in rows], 0, 0, 0, 0)
    torch.manual_seed(0)
    return build(config, folder, AutoTokenizer.from_pretrained(folder), {"training": encoded, "held-out": encoded},
                 Job(output))  # fmt: skip


def stored(spec, folder, shapes):
    """A function that reads a weight (N, K) of a variant, dequantized in float32."""
    if spec.variant.is_one_file:
        (path,) = folder.glob(f"*{spec.variant.suffix}")
        return format_of_file(path).weights_of_file(path, shapes, torch.float32).read
    checkpoint = Checkpoint(folder)
    forms = stored_weights(checkpoint)

    def read(name):
        if name in forms:
            return forms[name].read(checkpoint, name, shapes[name]).dequantize()
        return checkpoint.read(name).float()

    return read


def trained_weights(model):
    """The weights that the model computes with, in float32, and the merged ones in bf16, by name."""
    found, merged = {}, {}
    for name, layer in model.get_base_model().named_modules():
        if is_plain_adapter(layer):
            inner = layer.get_base_layer()
            shipped = inner.shipped
            for kind, grid in ((found, shipped.grid), (merged, None)):
                inner.shipped = replace(shipped, grid=grid, dtype=torch.float32)
                kind[f"{name}.weight"] = fused_layers._weight(inner)
            inner.shipped = shipped
    return found, merged


@pytest.mark.parametrize(
    "architecture, method, variant",
    [
        ("llama", "qlora", INT4),
        ("qwen3", "lora", INT4),
        ("llama", "lora", {"name": "int4", "packing": "tile_packed"}),
        ("llama", "qlora", {"name": "w4a16"}),
        ("llama", "lora", {"name": "awq"}),
        ("qwen3", "lora", {"name": "fp8-weight"}),
        ("llama", "lora", {"name": "gguf-q4_1"}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_variant_stores_exactly_the_weights_that_were_trained(tiny_model, tmp_path, architecture, method, variant):
    folder = tiny_model(architecture)
    config = config_for(variant["name"], [variant], method=method)
    trainer = trainer_for(config, folder, tmp_path / "checkpoints")
    before, _ = trained_weights(trainer.model)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    linear, (base,), spec = linear_weights(folder), merge_bases(config), trained_for(config)
    tables = table_weights(folder)
    written = Variants([spec], {spec.name: tmp_path / "variant"}, linear, tables)
    dtype = merge_dtype(config)
    merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "merged", base, linear, variants=written, dtype=dtype)
    assert not written.failed
    found, merged = trained_weights(trainer.model)
    root = load_file(tmp_path / "merged" / SINGLE_NAME)
    read = stored(spec, tmp_path / "variant", {name: tuple(tensor.shape) for name, tensor in root.items()})
    assert found.keys() == linear.keys()
    for name, weight in found.items():
        assert torch.equal(root[name].float(), merged[name]), name
        assert torch.equal(read(name), weight), name
        assert not torch.equal(weight, before[name]), name
    if spec.quantizes_embeddings:
        table = trainer.model.get_base_model().get_input_embeddings().weight
        assert torch.equal(read("model.embed_tokens.weight").bfloat16(), table.bfloat16())


def test_gradients_pass_the_rounding_unchanged(tiny_model, monkeypatch):
    monkeypatch.setattr(qat, "TILE_ELEMENTS", 1000)  # several tiles for a weight
    folder, x = tiny_model("llama"), torch.randn(3, 160)
    model, spec = adapted(folder), config_for("int4", [INT4]).quantize.variants[0]
    quantize_in_training(model, spec, folder, torch.float32)
    layer = model.get_base_model().get_submodule("model.layers.1.mlp.up_proj")
    a, b, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.get_base_layer().weight
    mine = x.clone().requires_grad_()
    y = layer(mine)
    merged = base.detach().double() + layer.scaling["default"] * b.double() @ a.double()
    rounded = rtn.round(merged.detach().bfloat16(), grouped(4, 32)).dequantize()
    through = merged.float() + (rounded - merged.float()).detach()  # the gradient of W, the value of round(W)
    theirs = x.clone().requires_grad_()
    expected = theirs @ through.T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(expected)
    found = torch.autograd.grad(y, (mine, a, b), slope)
    for ours, other in zip(found, torch.autograd.grad(expected, (theirs, a, b), slope), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainer", [name for name, row in TRAINERS.items() if row.sequences == 2])
def test_preference_training_is_quantized_too(tiny_model, tmp_path, monkeypatch, trainer):
    write_pairs(tmp_path)
    quantize = {"variants": [INT4], "on_gate_failure": "warn"}
    train = {**STEPS, "trainer": trainer, "qat": "int4", "max_steps": 2}
    place = write_place(tmp_path, tiny_model("llama"), data=PAIRS, train=train, quantize=quantize)
    monkeypatch.chdir(tmp_path)
    config = load_config(str(place.config))
    run_one(config, "train", start=run_stage_here)
    workspace = run_one(config, "merge", start=run_stage_here)
    root = load_file(workspace.release / SINGLE_NAME)
    (spec,), shapes = config.quantize.variants, {name: tuple(tensor.shape) for name, tensor in root.items()}
    weight = stored(spec, workspace.quantized / spec.name, shapes)("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(weight, rtn.round(root["model.layers.1.mlp.up_proj.weight"], grouped(4, 32)).dequantize())


def test_model_without_its_adapter_is_the_quantized_base(tiny_model):
    folder, ids = tiny_model("llama"), torch.arange(40)[None]
    model, base = adapted(folder), base_model(folder, torch.float32)
    fuse_training_step(model, torch.float32)
    quantize_in_training(model, config_for("int4", [{"name": "int4"}]).quantize.variants[0], folder, torch.float32)
    for name, layer in layers_of(base).items():
        if name != "lm_head":
            grid = grouped(4, fitting_group_size(layer.in_features, 64))
            layer.weight.data = rtn.round(layer.weight.data.bfloat16(), grid).dequantize()
    with torch.no_grad(), model.eval().disable_adapter():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, base(ids).logits, rtol=1e-2, atol=1e-2)


def test_layer_without_adapter_is_quantized_too_and_a_kept_one_is_not(tiny_model):
    folder = tiny_model("llama")
    model = adapted(folder, torch.bfloat16, targets=["q_proj"])
    before = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    quantize_in_training(model, config_for("int4", [INT4]).quantize.variants[0], folder, torch.float32)
    for name, layer in layers_of(model).items():
        if "q_proj" not in name and name != "lm_head":
            x = torch.randn(2, layer.in_features)
            kept = name in INT4["keep"]
            weight = before[name].float() if kept else rtn.round(before[name], grouped(4, 32)).dequantize()
            bias = 0 if layer.bias is None else layer.bias.float()
            torch.testing.assert_close(layer(x.bfloat16() if kept else x).float(), x @ weight.T + bias,
                                       rtol=2e-2 if kept else 1e-5, atol=2e-2 if kept else 1e-4)  # fmt: skip


def layers_of(model):
    found = (model.get_base_model() if hasattr(model, "peft_config") else model).named_modules()
    return {name: layer for name, layer in found if type(layer) is torch.nn.Linear and "lora_" not in name}


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_stopped_training_goes_on_to_the_same_weights(tiny_model, tmp_path, method):
    folder, config = tiny_model("llama"), config_for("int4", method=method, max_steps=4, evaluate_every=2)
    whole = trainer_for(config, folder, tmp_path / "whole")
    whole.train()
    again = trainer_for(config, folder, tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (again, whole))
    trained = [name for name, parameter in theirs.items() if parameter.requires_grad]
    assert trained and all(torch.equal(ours[name], theirs[name]) for name in trained)
    losses = [[row["eval_loss"] for row in t.state.log_history if "eval_loss" in row] for t in (again, whole)]
    assert losses[0] == losses[1]


def test_held_out_loss_is_that_of_the_quantized_model(tiny_model, tmp_path):
    folder = tiny_model("llama")
    plain = trainer_for(config_for("int4", [{"name": "int4"}]), folder, tmp_path / "a")
    coarse = trainer_for(config_for("gguf-q4_0", ["gguf-q4_0"]), folder, tmp_path / "b")
    losses = [trainer.evaluate()["eval_loss"] for trainer in (plain, coarse)]
    assert losses[0] != losses[1]


def test_fingerprint_of_training_includes_the_settings_of_its_variant(tmp_path):
    def about(**settings):
        return train.depends(config_for("int4", [{"name": "int4", **settings}]), Workspace(tmp_path), ())

    assert about() == about() and about(gate={"rise": 0.5}) == about()
    assert about(group_size=32) != about()


def test_default_roundings_and_merges_are_as_they_were():
    config = config_for(None, ["int4"])
    assert "qat" not in dump_config(config) and config.train.lora.dropout == 0.05
    assert config.quantize.variants[0].rounding == CALIBRATED and len(merge_bases(config)) == 2
    with_it = config_for("int4", ["int4", "int8"])
    assert with_it.train.lora.dropout == 0 and with_it.quantize.calibrated == () and len(merge_bases(with_it)) == 1
    assert Config.model_validate(yaml.safe_load(dump_config(with_it))) == with_it


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"train": {"qat": "int3"}}, 'train.qat: "int3" is refused: allowed are int8'),
        ({"train": {"qat": "bnb-nf4"}}, "train.qat: .* its library rounds it, which training cannot; allowed are"),
        ({"train": {"qat": "w4a16"}}, "train.qat w4a16: is not among quantize.variants. Try: add it there"),
        ({"data": None}, "train.qat int4: nothing is trained. Try: leave out the key, or set data"),
        ({"train": {"qat": "int4", "lora": {"dropout": 0.1}}}, "train.lora.dropout 0.1: .* Try: train.lora.dropout=0"),
        (
            {"train": {"qat": "int4", "lora": {"options": {"use_dora": True}}}},
            "train.lora.options use_dora: train.qat trains plain LoRA on the unchanged base. Try: leave it out",
        ),
        (
            {"train": {"qat": "int4", "lora": {"options": {"init_lora_weights": "pissa"}}}},
            "train.lora.options init_lora_weights: train.qat trains plain LoRA",
        ),
        ({"merge": {"base": "bf16"}}, "merge.base bf16: .* Try: merge.base=nf4"),
        (
            {"quantize": {"variants": [{"name": "int4", "rounding": "gptq"}]}},
            "train.qat int4: trains weights that are rounded with rtn, not gptq. Try: leave out rounding of int4",
        ),
        ({"quantize": {"variants": [{"name": "int4", "target": {"bits": 4.6}}]}}, "int4: its target .* Try: no target"),
    ],
)
def test_contradicting_setting_is_refused_in_one_line(settings, said):
    tree = {"name": "tiny", "model": {"source": "ada/base"}, "data": {"source": "rows.jsonl"}, "train": {"qat": "int4"}}
    with pytest.raises(ConfigError, match=said) as refusal:
        parse_config(tree | settings, "tiny.yaml")
    assert "\n" not in str(refusal.value)


def test_trainer_that_cannot_quantize_is_refused(monkeypatch):
    (name, trainer), *_ = TRAINERS.items()
    monkeypatch.setitem(TRAINERS, name, replace(trainer, quantizes=False))
    with pytest.raises(ValueError, match=f"train.qat int4: train.trainer {name} trains without it"):
        config_for("int4")


def test_adapter_that_is_not_plain_is_refused(tiny_model):
    model = adapted(tiny_model("llama"))
    model.get_base_model().model.norm.weight.requires_grad = True
    with pytest.raises(UserError, match="train.qat int4: quantizes plain LoRA layers only, .* trains .*norm.weight"):
        quantize_in_training(model, config_for("int4").quantize.variants[0], tiny_model("llama"), torch.float32)


def test_model_with_experts_is_refused_before_it_is_loaded(tiny_model):
    with pytest.raises(ModelError, match="train.qat int8: cannot quantize experts in training"):
        check_model(config_for("int8").quantize.variants[0], tiny_model("mixtral"))


def test_sharded_model_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="train.qat int4: cannot round the shards of fsdp"):
        check_model(config_for("int4").quantize.variants[0], tiny_model("llama"))


@pytest.mark.slow
@pytest.mark.usefixtures("cold")
def test_training_that_is_killed_gives_the_same_release(tmp_path, tiny_model):
    train = {"qat": "int4", "max_steps": 40, "checkpoint_every": 1, "lora": {"rank": 4}}
    whole, killed = (
        write_place(tmp_path / name, tiny_model("llama"), train=train, quantize={"variants": [INT4]})
        for name in ("whole", "killed")
    )
    whole.tunepress("run", "tiny.yaml")
    process = subprocess.Popen(killed.command("run", "tiny.yaml"), cwd=killed.folder, env=killed.env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for_training(killed, process)
    while not list((killed.run_folder / "checkpoints").glob("*/checkpoint-*/on-disk")):
        time.sleep(0.01)
    os.kill(stage_process_of(killed), signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    killed.tunepress("run", "tiny.yaml")
    assert json.loads((killed.run_folder / "measurements" / "training.json").read_text())["resumed_from_step"] > 0
    for path in ("adapter/adapter_model.safetensors", "model.safetensors", "int4/model.safetensors"):
        assert (killed.release / path).read_bytes() == (whole.release / path).read_bytes(), path
    card = (whole.release / "README.md").read_text()
    assert "each step computed with the weights that `int4` stores (QAT)" in card
    assert "as in every step of the training (quantization-aware training)" in card
    assert "as in every step" in (whole.release / "int4" / "README.md").read_text()
