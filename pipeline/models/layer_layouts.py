"""The tensors of well-known decoders, from `config.json` alone and without transformers.

Names and shapes of a checkpoint do not say which of its matrices are linear layers, so this knows architectures by
name. It answers only if it recognizes every setting and its value. Otherwise it returns nothing, and the caller
builds the model with transformers, which is slower (about four seconds of imports) and knows every architecture.
The test compares both answers for every architecture here, and for damaged settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.models.architectures import ARCHITECTURES, COMMON, PER_LAYER, SIZES, Architecture
from pipeline.models.setting_values import is_width

_Shapes = dict[str, tuple[int, int]]

TIED_HEAD = "lm_head.weight"  # stored by some checkpoints although it is the embedding
MAX_LAYERS = 1000  # beyond it a configuration is left to transformers


@dataclass(frozen=True)
class Layout:
    """The matrices of a model, in the order in which transformers has its modules.

    Attributes:
        linear: names and shapes (N, K) of the linear layers without the output head.
        tables: names and shapes (V, H) of the embedding and of an output head of its own.
        vectors: names and lengths of norms and biases.
        plain_embedding: True if the embedding only looks rows up, whatever the version of transformers.
    """

    linear: _Shapes
    tables: _Shapes
    vectors: dict[str, tuple[int]]
    plain_embedding: bool


def layout(config: Mapping[str, Any]) -> Layout | None:
    """Return the layout of a model, or None if anything in its configuration is not recognized.

    Args:
        config: what `config.json` says.
    """
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None or not _is_recognized(config, architecture):
        return None
    hidden, heads, vocabulary = (config[key] for key in ("hidden_size", "num_attention_heads", "vocab_size"))
    head = config.get("head_dim", hidden // heads)
    inner = config["intermediate_size"]
    widths = {"hidden": hidden, "inner": inner, "both": 2 * inner, "head": head}
    widths |= {"queries": heads * head, "keys": config["num_key_value_heads"] * head}
    widths["qkv"] = widths["queries"] + 2 * widths["keys"]
    linear = {
        f"model.layers.{layer}.{name}.weight": (widths[rows], widths[columns])
        for layer in range(config["num_hidden_layers"])
        for name, rows, columns in architecture.block
    }
    is_tied = config.get("tie_word_embeddings", architecture.tied)
    names = ("model.embed_tokens.weight",) if is_tied else ("model.embed_tokens.weight", "lm_head.weight")
    tables = dict.fromkeys(names, (vocabulary, hidden))
    return Layout(linear, tables, _vectors(config, architecture, widths), architecture.plain_embedding)


def _vectors(config: Mapping[str, Any], of: Architecture, widths: Mapping[str, int]) -> dict[str, tuple[int]]:
    """Return names and lengths of the norms and biases of a model."""
    parts = (".weight", ".bias") if of.norm_bias else (".weight",)
    norms = (*((name, "hidden") for name in of.norms), *of.other_norms)
    block = {f"{name}{part}": widths[width] for name, width in norms for part in parts}
    for name, rows, _ in of.block:
        if any(name.startswith(begin) and config.get(key, default) for begin, key, default in of.biases):
            block[f"{name}.bias"] = widths[rows]
    found = {f"model.norm{part}": (widths["hidden"],) for part in parts}
    for layer in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}": (length,) for name, length in block.items()}
    return found


def _is_recognized(config: Mapping[str, Any], architecture: Architecture) -> bool:
    """Return True if every setting is known, has a value that transformers takes, and fits the others."""
    needed = {*SIZES, *architecture.needs}
    known = {**SIZES, **COMMON, **({"head_dim": is_width} if architecture.has_head_dim else {})}
    known |= architecture.settings
    if not needed <= config.keys() <= known.keys() or not all(known[key](value) for key, value in config.items()):
        return False
    hidden, heads, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    tokens = [config.get(key) for key in ("pad_token_id", "bos_token_id")]
    return (
        layers <= MAX_LAYERS
        and hidden % heads == 0
        and heads % config["num_key_value_heads"] == 0
        and config.get("head_dim", hidden // heads) % 2 == 0  # rotary positions turn pairs
        and all(token is None or token < config["vocab_size"] for token in tokens)
        and all(len(config[key]) == layers for key in PER_LAYER if config.get(key) is not None)
    )
