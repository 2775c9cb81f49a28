"""Tiny LoRA adapters, and models to train them on."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 12
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def base_model(folder, dtype=torch.bfloat16, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def edit(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
