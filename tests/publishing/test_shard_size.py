"""Shards: no published file is larger than 5 GB."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import VariantSpec
from pipeline.models.checkpoint import Checkpoint, CheckpointWriter, read_header
from pipeline.models.matrices import linear_weights
from pipeline.quantization.writer import quantize_checkpoint
from pipeline.training import merge

SHARD, HEADER = 200_000, 20_000


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_checkpoint_of_twelve_gigabytes_is_written_in_files_of_at_most_five(tmp_path):
    rows, width = 1 << 19, 1 << 11  # 2 GB each, of which only the last row is written: the rest takes no room
    plan = {f"model.layers.{n}.weight": (torch.bfloat16, (rows, width)) for n in range(6)}
    with contextlib.suppress(InterruptedError), CheckpointWriter(tmp_path, plan) as writer:
        for name in plan:
            writer.write(name, torch.ones(1, width, dtype=torch.bfloat16), rows - 1)
        shards = sorted(tmp_path.iterdir())
        assert [path.name[:20] for path in shards] == [f"model-0000{n}-of-00003" for n in (1, 2, 3)]
        held = [read_header(path)[0] for path in shards]
        assert [len(tensors) for tensors in held] == [2, 2, 2] and set().union(*held) == plan.keys()
        assert all(path.stat().st_size <= 5_000_000_000 for path in shards)
        raise InterruptedError  # before it asks for the other rows


def test_a_merge_begins_a_new_shard_when_one_is_full(tiny_model, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_model("llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(merge, "SHARD_BYTES", SHARD)
    merge.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", "bf16", linear_weights(base))
    shards, merged = shards_of(tmp_path / "merged"), Checkpoint(tmp_path / "merged")
    largest = max(info.nbytes for info in Checkpoint(base).values())
    assert len(shards) > 1 and all(s.stat().st_size <= max(SHARD, largest) + HEADER for s in shards)
    assert merged.keys() == Checkpoint(base).keys()
    assert all(torch.equal(merged.read(name), Checkpoint(base).read(name)) for name in merged if "q_proj" not in name)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_a_variant_in_shards_holds_what_it_holds_in_one_file(tiny_model, tmp_path, variant):
    base = tiny_model("llama")
    spec = VariantSpec(name=variant).resolved()
    for folder, size in (("whole", 10**9), ("shards", SHARD)):
        quantize_checkpoint(base, [spec], {variant: tmp_path / folder}, linear_weights(base), shard_bytes=size)
    whole, sharded = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "shards")
    largest = max(info.nbytes for info in whole.values())
    shards = shards_of(tmp_path / "shards")
    assert len(shards_of(tmp_path / "whole")) == 1 < len(shards)
    assert all(shard.stat().st_size <= max(SHARD, largest) + HEADER for shard in shards)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole.read(name), sharded.read(name)) for name in whole)
