"""Well-known decoders by the name of their architecture, with the settings that their configurations may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Check = Callable[[Any], bool]

MAX_WIDTH = 1 << 24  # beyond it a configuration is left to transformers

_ATTENTION = (
    ("self_attn.q_proj", "queries", "hidden"),
    ("self_attn.k_proj", "keys", "hidden"),
    ("self_attn.v_proj", "keys", "hidden"),
    ("self_attn.o_proj", "hidden", "queries"),
)
_DOWN = (("mlp.down_proj", "hidden", "inner"),)
_GATED = (("mlp.gate_proj", "inner", "hidden"), ("mlp.up_proj", "inner", "hidden"), *_DOWN)
_JOINED_GATE = (("mlp.gate_up_proj", "both", "hidden"), *_DOWN)


@dataclass(frozen=True)
class Architecture:
    """What a decoder block consists of, and which settings its configuration may have.

    Attributes:
        block: name, rows and columns of each linear layer, by names of widths.
        tied: True if the output head is the embedding unless the configuration says otherwise.
        needs: settings without which it is left to transformers, which has a default of its own for them.
        has_head_dim: False if heads always share the hidden width, whatever `head_dim` says.
        settings: further settings that it may have; none of them changes a name or a shape.
    """

    block: tuple[tuple[str, str, str], ...] = (*_ATTENTION, *_GATED)
    tied: bool = False
    needs: tuple[str, ...] = ()
    has_head_dim: bool = True
    plain_embedding: bool = True
    settings: Mapping[str, Check] = field(default_factory=dict)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_width(value: Any) -> bool:
    """Return True for a whole number from 1 to `MAX_WIDTH`."""
    return type(value) is int and 0 < value <= MAX_WIDTH


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) and value > 0


def _is_number_or_whole(value: Any) -> bool:
    return _is_number(value) or is_width(value)


def _is_share(value: Any) -> bool:
    return type(value) is float and 0 <= value < 1


def _is_part(value: Any) -> bool:
    return _is_number(value) and value <= 1


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_token(value: Any) -> bool:
    return value is None or _is_whole(value)


def _are(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def _one_of(*allowed: Any) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _is_rope(value: Any) -> bool:
    """Return True for rotary parameters in a form that every architecture here takes."""
    if type(value) is not dict:
        return False
    kinds = [value[key] for key in ("rope_type", "type") if key in value]
    kind = kinds[0] if kinds and all(_one_of(*_ROPE_KEYS)(k) and k == kinds[0] for k in kinds) else None
    if kind is None:
        return False
    numbers = {key: number for key, number in value.items() if key not in ("rope_type", "type")}
    return (
        set(_ROPE_KEYS[kind]) <= numbers.keys() <= {*_ROPE_KEYS[kind], "rope_theta", "partial_rotary_factor"}
        and all(map(_is_number_or_whole, numbers.values()))
        and _is_part(numbers.get("partial_rotary_factor", 1.0))
        and is_width(numbers.get("original_max_position_embeddings", 1))
        and (kind != "llama3" or numbers["low_freq_factor"] < numbers["high_freq_factor"])
    )


def _is_rope_by_kind(value: Any) -> bool:
    """Return True for rotary parameters of each kind of attention by itself."""
    return type(value) is dict and value.keys() == set(_KINDS) and all(map(_is_rope, value.values()))


_KINDS = ("full_attention", "sliding_attention")
PER_LAYER = ("layer_types", "no_rope_layers")
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
SIZES: dict[str, Check] = {
    "model_type": _is_text,
    "vocab_size": is_width,
    "hidden_size": is_width,
    "intermediate_size": is_width,
    "num_hidden_layers": is_width,
    "num_attention_heads": is_width,
    "num_key_value_heads": is_width,
}
COMMON: dict[str, Check] = {
    **dict.fromkeys(("_name_or_path", "transformers_version", "unsloth_version"), _is_text),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "is_llama_config", "rope_interleaved"), _is_flag),
    "unsloth_fixed": _is_flag,
    "transformers.js_config": lambda value: type(value) is dict,
    **dict.fromkeys(("dtype", "torch_dtype"), _one_of("bfloat16", "float16", "float32")),
    "architectures": _are(_is_text),
    "hidden_act": _one_of(*_ACTIVATIONS),
    "max_position_embeddings": is_width,
    "initializer_range": _is_share,
    "attention_dropout": lambda value: _is_share(value) or _one_of(0)(value),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _is_token),
    "eos_token_id": lambda value: _is_token(value) or _are(_is_whole)(value),
    "rope_theta": _is_number_or_whole,
    "rope_scaling": _or_none(_is_rope),
    "rope_parameters": _is_rope,
    "pretraining_tp": is_width,
}
_RMS: dict[str, Check] = {"rms_norm_eps": _is_number}
_BIAS: dict[str, Check] = {"attention_bias": _is_flag}
_SLIDING: dict[str, Check] = {"sliding_window": _or_none(is_width)}
_SLIDING_LAYERS: dict[str, Check] = {**_SLIDING, "layer_types": _are(_one_of(*_KINDS))}
_QWEN = _RMS | _SLIDING_LAYERS | {"use_sliding_window": _is_flag, "max_window_layers": is_width}
_LLAMA = _RMS | _BIAS | {"mlp_bias": _is_flag}
_PARTIAL: dict[str, Check] = {"partial_rotary_factor": _is_part}
_GEMMA: dict[str, Check] = {
    **_RMS,
    **_BIAS,
    "hidden_activation": _one_of(*_ACTIVATIONS),
    "use_bidirectional_attention": _one_of(None, False),
}
_GEMMA2: dict[str, Check] = {
    **_GEMMA,
    **_SLIDING_LAYERS,
    "cache_implementation": _one_of("hybrid"),
    "query_pre_attn_scalar": is_width,
    "final_logit_softcapping": _or_none(_is_number),
    "attn_logit_softcapping": _or_none(_is_number),
}
_GRANITE = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(settings=_LLAMA),
    "mistral": Architecture(settings=_RMS | _SLIDING),
    "ministral": Architecture(needs=("head_dim",), settings=_RMS | _SLIDING_LAYERS),
    "qwen2": Architecture(settings=_QWEN),
    "qwen3": Architecture(needs=("head_dim",), settings=_QWEN | _BIAS),
    "smollm3": Architecture(
        tied=True,
        needs=("pad_token_id",),
        settings={
            **_QWEN,
            **_LLAMA,
            "no_rope_layers": _or_none(_are(_one_of(0, 1))),
            "no_rope_layer_interval": is_width,
        },
    ),
    # Some versions of transformers scale Gemma's rows in the embedding's own class, others do it in the model.
    "gemma": Architecture(tied=True, needs=("head_dim",), plain_embedding=False, settings=_GEMMA),
    "gemma2": Architecture(tied=True, needs=("head_dim",), plain_embedding=False, settings=_GEMMA2),
    "gemma3_text": Architecture(
        tied=True,
        needs=("head_dim",),
        plain_embedding=False,
        settings={
            **_GEMMA2,
            "rope_local_base_freq": _is_number_or_whole,
            "rope_parameters": _is_rope_by_kind,
            "sliding_window_pattern": is_width,
            "_sliding_window_pattern": is_width,
        },
    ),
    "phi3": Architecture(
        block=(("self_attn.o_proj", "hidden", "queries"), ("self_attn.qkv_proj", "qkv", "hidden"), *_JOINED_GATE),
        needs=("pad_token_id",),
        settings={
            **_RMS,
            **_SLIDING,
            **_BIAS,
            **_PARTIAL,
            "rope_scaling": lambda value: value is None,
            "rope_parameters": lambda value: _is_rope(value) and value.get("rope_type") == "default",
            "resid_pdrop": _is_share,
            "embd_pdrop": _is_share,
            "original_max_position_embeddings": is_width,
        },
    ),
    "olmo2": Architecture(needs=("pad_token_id",), settings=_RMS | _BIAS),
    "olmo3": Architecture(
        needs=("pad_token_id",),
        settings={
            **_RMS,
            **_BIAS,
            **_SLIDING_LAYERS,
            "rope_parameters": lambda value: _is_rope(value) or _is_rope_by_kind(value),
        },
    ),
    "cohere2": Architecture(
        tied=True,
        settings={
            **_BIAS,
            **_SLIDING_LAYERS,
            "layer_norm_eps": _is_number,
            "logit_scale": _is_number,
            "sliding_window_pattern": is_width,
            "_sliding_window_pattern": is_width,
        },
    ),
    "exaone4": Architecture(
        settings=_RMS | _SLIDING_LAYERS | {"sliding_window": is_width, "sliding_window_pattern": is_width}
    ),
    "granite": Architecture(settings=_LLAMA | dict.fromkeys(_GRANITE, _is_number)),
    "starcoder2": Architecture(
        block=(*_ATTENTION, ("mlp.c_fc", "inner", "hidden"), ("mlp.c_proj", "hidden", "inner")),
        tied=True,
        settings={
            **_SLIDING,
            "norm_epsilon": _is_number,
            "use_bias": _is_flag,
            "residual_dropout": _is_share,
            "embedding_dropout": _is_share,
        },
    ),
    "stablelm": Architecture(
        has_head_dim=False,
        settings={
            **_PARTIAL,
            "layer_norm_eps": _is_number,
            "use_qkv_bias": _is_flag,
            "qk_layernorm": _is_flag,
            "use_parallel_residual": _is_flag,
            "hidden_dropout": _is_share,
        },
    ),
    "seed_oss": Architecture(
        needs=("head_dim", "pad_token_id"),
        settings=_LLAMA | {"attention_out_bias": _is_flag, "residual_dropout": _is_share},
    ),
    "arcee": Architecture(block=(*_ATTENTION, ("mlp.up_proj", "inner", "hidden"), *_DOWN), settings=_LLAMA),
    "glm4": Architecture(
        block=(*_ATTENTION, *_JOINED_GATE), needs=("head_dim", "pad_token_id"), settings=_RMS | _BIAS | _PARTIAL
    ),
}
