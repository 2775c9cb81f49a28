"""Full fine-tuning: all weights of a small model, trained in float32 and published in bf16."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.loader import load_config
from pipeline.config.training_catalog import METHODS, UNCHANGED_BASE
from pipeline.errors import ConfigError, ModelError
from pipeline.system.hardware import COMPUTE_DTYPE
from pipeline.training.accelerate_launch import read_launch
from pipeline.training.merge import check_mergeable, merge_checkpoint
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.preflight import check_shared
from pipeline.workflow.run import run, run_one
from tests.support.runs import write_place

FULL = next(name for name, method in METHODS.items() if not method.adapts)
STEPS = {"method": FULL, "max_steps": 6, "evaluate_every": 3, "learning_rate": 0.003}


def place_for(folder, model, **changes):
    folder.mkdir(exist_ok=True)
    return write_place(folder, model, **{"train": STEPS, **changes})


def trained(folder, model, monkeypatch, *settings, **changes):
    place = place_for(folder, model, **changes)
    monkeypatch.chdir(folder)
    return run_one(load_config(str(place.config), settings), "train", start=run_stage_here)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_release_is_the_trained_weights_in_bf16(tiny_model, tmp_path, monkeypatch):
    variants = {"variants": [{"name": "int8"}], "on_gate_failure": "warn"}
    place = place_for(tmp_path, tiny_model("qwen3"), quantize=variants)
    monkeypatch.chdir(tmp_path)
    workspace = run(load_config(str(place.config)), start=run_stage_here)
    kept, merged = weights_of(workspace.trained), weights_of(workspace.release)
    base = weights_of(tiny_model("qwen3"))
    assert merged.keys() == base.keys() >= kept.keys()
    for name, value in kept.items():
        assert value.dtype == torch.float32
        assert torch.equal(merged[name], value.to(torch.bfloat16)), name
    assert sum(not torch.equal(merged[name], base[name]) for name in merged) > len(merged) / 2
    found = workspace.read_measurement("training")
    losses = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    assert found["held_out_loss"] == losses[-1] < losses[0]
    assert found["trainable_parameters"] == sum(value.numel() for value in kept.values())
    assert (workspace.release / "int8" / "model.safetensors").is_file()
    assert not (workspace.release / "adapter").exists() and not workspace.adapter.exists()
    card = (workspace.release / "README.md").read_text()
    assert "full fine-tuning" in card
    assert "adapter" not in card.lower() and "lora" not in card.lower()
    assert "adapter" not in json.dumps(place.events()).lower()
    place.tunepress("verify", "runs/tiny/release", "--no-measure")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_after_a_stop_with_the_same_bytes(tiny_model, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv(COMPUTE_DTYPE, dtype)
    model = tiny_model("llama")
    whole = trained(tmp_path / "whole", model, monkeypatch)
    monkeypatch.setattr("pipeline.workflow.stages.fine_tune.gather_adapter", lambda model: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        trained(tmp_path / "stopped", model, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setenv(COMPUTE_DTYPE, dtype)
    (last,) = (tmp_path / "stopped/runs/tiny/checkpoints").glob("*/checkpoint-6")
    shutil.rmtree(last)  # as if it was stopped two steps before the end
    resumed = trained(tmp_path / "stopped", model, monkeypatch)
    assert resumed.read_measurement("training")["resumed_from_step"] == 4
    for name, value in weights_of(whole.trained).items():
        assert torch.equal(weights_of(resumed.trained)[name], value), name


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"trainer": "dpo"}, "trainer=dpo"),
        ({"trainer": "kto"}, "trainer=kto"),
        ({"preference": {"data": {"source": "pairs.jsonl"}}}, "preference"),
        ({"qat": "int8"}, "qat"),
        ({"lora": {"options": {"use_dora": True}}}, "lora.options"),
    ],
)
def test_settings_that_need_an_adapter_are_refused(tiny_model, tmp_path, settings, named):
    place = place_for(tmp_path, tiny_model("llama"), train={**STEPS, **settings})
    with pytest.raises(ConfigError, match=rf"train.*trains no adapter, which {named} needs. Try: method=qlora"):
        load_config(str(place.config))


def test_settings_of_an_adapter_are_named_as_unused(tiny_model, tmp_path):
    place = place_for(tmp_path, tiny_model("llama"), train={**STEPS, "lora": {"rank": 4}})
    assert "train.lora: has no effect, since train.method full" in place.tunepress("plan", str(place.config)).stdout
    assert load_config(str(place.config), ("train.method=lora",)).train.unused_remark is None


def test_several_processes_are_refused(tiny_model, tmp_path):
    place = place_for(tmp_path, tiny_model("llama"))
    with pytest.raises(ConfigError, match=f"--accelerate: train.method {FULL} trains in one process only"):
        check_shared(load_config(str(place.config)), read_launch("cpu-two"))


def test_table_that_a_tied_base_stores_twice_is_replaced_twice(tiny_model, tmp_path):
    base, trained = tmp_path / "base", tmp_path / "trained"
    shutil.copytree(tiny_model("gemma3_text"), base)
    shutil.copytree(base, trained)
    once = weights_of(base)
    save_file({name: value.float() * 1.5 for name, value in once.items()}, trained / "model.safetensors")
    table = once["model.embed_tokens.weight"]
    save_file({**once, "lm_head.weight": table.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    merge_checkpoint(base, trained, tmp_path / "merged", UNCHANGED_BASE, whole=True)
    merged = weights_of(tmp_path / "merged")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name], (table.float() * 1.5).to(torch.bfloat16)), name


def test_model_that_the_base_cannot_hold_is_refused_before_training(tiny_model):
    def write(folder):
        save_file(weights_of(tiny_model("llama")) | {"ghost": torch.zeros(2)}, folder / "model.safetensors")

    with pytest.raises(ModelError, match="its trained weights could not be published: changes 'ghost'.* Try: another"):
        check_mergeable(tiny_model("llama"), write, (), (), whole=True)


def test_best_checkpoint_is_the_result(tiny_model, tmp_path, monkeypatch):
    every = {"early_stopping": 2, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 9}
    steps = {**STEPS, **every, "learning_rate": 0.1, "max_steps": 8}
    workspace = trained(tmp_path / "work", tiny_model("llama"), monkeypatch, train=steps)
    found = workspace.read_measurement("training")
    assert found["best_step"] < found["steps"]
    (best,) = workspace.checkpoints.glob(f"*/checkpoint-{found['best_step']}")
    kept = weights_of(workspace.trained)
    assert all(torch.equal(kept[name], value) for name, value in weights_of(best).items())
