"""No published file is larger than 5 GB, by default."""

from __future__ import annotations

import inspect

import torch

from pipeline import merging
from pipeline.checkpoint import SHARD_BYTES, Checkpoint, CheckpointWriter
from pipeline.quantization import stream


def test_a_shard_has_at_most_five_gigabytes_wherever_one_is_written():
    assert SHARD_BYTES <= 5_000_000_000
    assert inspect.signature(CheckpointWriter).parameters["shard_bytes"].default == SHARD_BYTES
    assert inspect.signature(stream.quantize_checkpoint).parameters["shard_bytes"].default == SHARD_BYTES


def test_a_merge_begins_a_new_shard_when_one_is_full(tiny_model, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pipeline.models import linear_weights

    base = tiny_model("llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(merging, "SHARD_BYTES", 200_000)
    merging.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", "bf16", linear_weights(base))
    shards = list((tmp_path / "merged").glob("*.safetensors"))
    largest = max(info.nbytes for info in Checkpoint(base).values())
    assert len(shards) > 1 and all(s.stat().st_size <= max(200_000, largest) + 20_000 for s in shards)
    assert torch.equal(Checkpoint(tmp_path / "merged").read("lm_head.weight"), Checkpoint(base).read("lm_head.weight"))
