"""Models of the shipped recipes: their real configurations, tiny stand-ins, and repositories without weights."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from functools import cache
from pathlib import Path

from pipeline.config.loader import load_config
from tests.support.hub import LoopbackHub
from tests.support.hub.store import Entry

SHARD_BYTES = 3_000_000_000

# What config.json of each model says, and how many parameters its page gives.
MODELS = {
    "gemma-3-1b": (
        999_885_952,
        {
            "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "max_position_embeddings": 32768, "sliding_window": 512, "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        1_235_814_400,
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "max_position_embeddings": 131072, "tie_word_embeddings": True,
        },
    ),
    "qwen3-1.7b": (
        1_720_574_976,
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 40960, "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": (
        4_022_468_096,
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 262144, "tie_word_embeddings": True,
        },
    ),
    "smollm3-3b": (
        3_075_098_624,
        {
            "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "pad_token_id": 128004,
            "max_position_embeddings": 65536, "tie_word_embeddings": True,
        },
    ),
    "tinyllama-1.1b": (
        1_100_048_384,
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
            "max_position_embeddings": 2048, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip

# The shipped recipes, each with a tiny checkpoint of its model's architecture: `tiny_model`'s arguments.
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
RECIPES = {
    "gemma-3-1b": ("gemma3_text", {}),
    "llama-3.2-1b": ("llama", {"tie_word_embeddings": True, "attention_bias": False, "rope_parameters": _LLAMA_3}),
    "qwen3-1.7b": ("qwen3", {}),
    "qwen3-4b": ("qwen3", {}),
    "smollm3-3b": ("smollm3", {}),
    "tinyllama-1.1b": ("llama", {"attention_bias": False}),
}


@cache
def shapes_of(recipe: str) -> dict[str, tuple[int, ...]]:
    """Every stored tensor of a recipe's model; no weight is made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(MODELS[recipe][1])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def put_recipes(hub: LoopbackHub) -> None:
    """The model of every shipped recipe."""
    for recipe, (_, config) in MODELS.items():
        put_hollow(hub, load_config(recipe).model.source, shapes_of(recipe), config)


def put_hollow(hub: LoopbackHub, repo: str, shapes: dict[str, tuple[int, ...]], config: dict) -> None:
    """A repository whose shards are headers with nothing behind them, and as long as if there were."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += _bytes(shape)
    names = ["model.safetensors"]
    files = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    hub.put(repo, files)
    repository = hub.repo(repo)
    head = repository.resolve("main")
    entries = {name: _hollow(hub, f"{repo}/{name}", tensors) for name, tensors in zip(names, shards, strict=True)}
    commit = repository.add_commit(head, {**head.files, **entries}, title="weights", author=repository.owner)
    repository.move("main", commit)


def _hollow(hub: LoopbackHub, seed: str, tensors: dict[str, tuple[int, ...]]) -> Entry:
    header, position = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + _bytes(shape)]}
        position += _bytes(shape)
    text = json.dumps(header).encode()
    name = hashlib.sha256(seed.encode()).hexdigest()
    path: Path = hub.store.blobs.path(name)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return Entry.of_lfs(name, 8 + len(text) + position)


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)
