"""Well-known decoders by the name of their architecture, with the settings that their configurations may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.models.setting_values import (
    KINDS,
    Check,
    are,
    is_flag,
    is_number,
    is_number_or_whole,
    is_part,
    is_rope,
    is_rope_by_kind,
    is_share,
    is_text,
    is_token,
    is_whole,
    is_width,
    one_of,
    or_none,
)

_ATTENTION = (
    ("self_attn.q_proj", "queries", "hidden"),
    ("self_attn.k_proj", "keys", "hidden"),
    ("self_attn.v_proj", "keys", "hidden"),
    ("self_attn.o_proj", "hidden", "queries"),
)
_DOWN = (("mlp.down_proj", "hidden", "inner"),)
_GATED = (("mlp.gate_proj", "inner", "hidden"), ("mlp.up_proj", "inner", "hidden"), *_DOWN)
_JOINED_GATE = (("mlp.gate_up_proj", "both", "hidden"), *_DOWN)
_BEFORE, _AFTER = "input_layernorm", "post_attention_layernorm"
_FOUR_NORMS = (_BEFORE, _AFTER, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = (("self_attn.q_norm", "head"), ("self_attn.k_norm", "head"))
_QUERY_NORMS = (("self_attn.q_norm", "queries"), ("self_attn.k_norm", "keys"))
_ATTENTION_BIAS = (("self_attn.", "attention_bias", False),)
_LLAMA_BIAS = (*_ATTENTION_BIAS, ("mlp.", "mlp_bias", False))


def _input_bias(setting: str, by_default: bool) -> tuple[tuple[str, str, bool], ...]:
    return tuple((f"self_attn.{part}_proj", setting, by_default) for part in "qkv")


@dataclass(frozen=True)
class Architecture:
    """What a decoder block consists of, and which settings its configuration may have.

    Attributes:
        block: name, rows and columns of each linear layer, by names of widths.
        norms: names of the norms that are as wide as the hidden states.
        other_norms: name and width of each other norm.
        norm_bias: True if the norms have biases.
        biases: the beginning of layer names, the setting that gives these layers a bias, and its default.
        tied: True if the output head is the embedding unless the configuration says otherwise.
        needs: settings without which it is left to transformers, which has a default of its own for them.
        has_head_dim: False if heads always share the hidden width, whatever `head_dim` says.
        settings: further settings that it may have; none of them changes a name or a shape.
    """

    block: tuple[tuple[str, str, str], ...] = (*_ATTENTION, *_GATED)
    norms: tuple[str, ...] = (_BEFORE, _AFTER)
    other_norms: tuple[tuple[str, str], ...] = ()
    norm_bias: bool = False
    biases: tuple[tuple[str, str, bool], ...] = ()
    tied: bool = False
    needs: tuple[str, ...] = ()
    has_head_dim: bool = True
    plain_embedding: bool = True
    settings: Mapping[str, Check] = field(default_factory=dict)


PER_LAYER = ("layer_types", "no_rope_layers")
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
SIZES: dict[str, Check] = {
    "model_type": is_text,
    "vocab_size": is_width,
    "hidden_size": is_width,
    "intermediate_size": is_width,
    "num_hidden_layers": is_width,
    "num_attention_heads": is_width,
    "num_key_value_heads": is_width,
}
COMMON: dict[str, Check] = {
    **dict.fromkeys(("_name_or_path", "transformers_version", "unsloth_version"), is_text),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "is_llama_config", "rope_interleaved"), is_flag),
    "unsloth_fixed": is_flag,
    "transformers.js_config": lambda value: type(value) is dict,
    **dict.fromkeys(("dtype", "torch_dtype"), one_of("bfloat16", "float16", "float32")),
    "architectures": are(is_text),
    "hidden_act": one_of(*_ACTIVATIONS),
    "max_position_embeddings": is_width,
    "initializer_range": is_share,
    "attention_dropout": lambda value: is_share(value) or one_of(0)(value),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), is_token),
    "eos_token_id": lambda value: is_token(value) or are(is_whole)(value),
    "rope_theta": is_number_or_whole,
    "rope_scaling": or_none(is_rope),
    "rope_parameters": is_rope,
    "pretraining_tp": is_width,
}
_RMS: dict[str, Check] = {"rms_norm_eps": is_number}
_BIAS: dict[str, Check] = {"attention_bias": is_flag}
_SLIDING: dict[str, Check] = {"sliding_window": or_none(is_width)}
_SLIDING_LAYERS: dict[str, Check] = {**_SLIDING, "layer_types": are(one_of(*KINDS))}
_QWEN = _RMS | _SLIDING_LAYERS | {"use_sliding_window": is_flag, "max_window_layers": is_width}
_LLAMA = _RMS | _BIAS | {"mlp_bias": is_flag}
_PARTIAL: dict[str, Check] = {"partial_rotary_factor": is_part}
_GEMMA: dict[str, Check] = {
    **_RMS,
    **_BIAS,
    "hidden_activation": one_of(*_ACTIVATIONS),
    "use_bidirectional_attention": one_of(None, False),
}
_GEMMA2: dict[str, Check] = {
    **_GEMMA,
    **_SLIDING_LAYERS,
    "cache_implementation": one_of("hybrid"),
    "query_pre_attn_scalar": is_width,
    "final_logit_softcapping": or_none(is_number),
    "attn_logit_softcapping": or_none(is_number),
}
_GRANITE = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(biases=_LLAMA_BIAS, settings=_LLAMA),
    "mistral": Architecture(settings=_RMS | _SLIDING),
    "ministral": Architecture(needs=("head_dim",), settings=_RMS | _SLIDING_LAYERS),
    "qwen2": Architecture(biases=_input_bias("", True), settings=_QWEN),
    "qwen3": Architecture(other_norms=_HEAD_NORMS, biases=_ATTENTION_BIAS, needs=("head_dim",), settings=_QWEN | _BIAS),
    "smollm3": Architecture(
        biases=_LLAMA_BIAS,
        tied=True,
        needs=("pad_token_id",),
        settings={
            **_QWEN,
            **_LLAMA,
            "no_rope_layers": or_none(are(one_of(0, 1))),
            "no_rope_layer_interval": is_width,
        },
    ),
    # Some versions of transformers scale Gemma's rows in the embedding's own class, others do it in the model.
    "gemma": Architecture(
        biases=_ATTENTION_BIAS, tied=True, needs=("head_dim",), plain_embedding=False, settings=_GEMMA
    ),
    "gemma2": Architecture(
        norms=_FOUR_NORMS,
        biases=_ATTENTION_BIAS,
        tied=True,
        needs=("head_dim",),
        plain_embedding=False,
        settings=_GEMMA2,
    ),
    "gemma3_text": Architecture(
        norms=_FOUR_NORMS,
        other_norms=_HEAD_NORMS,
        biases=_ATTENTION_BIAS,
        tied=True,
        needs=("head_dim",),
        plain_embedding=False,
        settings={
            **_GEMMA2,
            "rope_local_base_freq": is_number_or_whole,
            "rope_parameters": is_rope_by_kind,
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
            "rope_parameters": lambda value: is_rope(value) and value.get("rope_type") == "default",
            "resid_pdrop": is_share,
            "embd_pdrop": is_share,
            "original_max_position_embeddings": is_width,
        },
    ),
    "olmo2": Architecture(
        norms=_FOUR_NORMS[1::2],
        other_norms=_QUERY_NORMS,
        biases=_ATTENTION_BIAS,
        needs=("pad_token_id",),
        settings=_RMS | _BIAS,
    ),
    "olmo3": Architecture(
        norms=_FOUR_NORMS[1::2],
        other_norms=_QUERY_NORMS,
        biases=_ATTENTION_BIAS,
        needs=("pad_token_id",),
        settings={
            **_RMS,
            **_BIAS,
            **_SLIDING_LAYERS,
            "rope_parameters": lambda value: is_rope(value) or is_rope_by_kind(value),
        },
    ),
    "cohere2": Architecture(
        norms=(_BEFORE,),
        biases=_ATTENTION_BIAS,
        tied=True,
        settings={
            **_BIAS,
            **_SLIDING_LAYERS,
            "layer_norm_eps": is_number,
            "logit_scale": is_number,
            "sliding_window_pattern": is_width,
            "_sliding_window_pattern": is_width,
        },
    ),
    "exaone4": Architecture(
        norms=_FOUR_NORMS[1::2],
        other_norms=_HEAD_NORMS,
        settings=_RMS | _SLIDING_LAYERS | {"sliding_window": is_width, "sliding_window_pattern": is_width},
    ),
    "granite": Architecture(biases=_LLAMA_BIAS, settings=_LLAMA | dict.fromkeys(_GRANITE, is_number)),
    "starcoder2": Architecture(
        block=(*_ATTENTION, ("mlp.c_fc", "inner", "hidden"), ("mlp.c_proj", "hidden", "inner")),
        norm_bias=True,
        biases=(("", "use_bias", True),),
        tied=True,
        settings={
            **_SLIDING,
            "norm_epsilon": is_number,
            "use_bias": is_flag,
            "residual_dropout": is_share,
            "embedding_dropout": is_share,
        },
    ),
    "stablelm": Architecture(
        norm_bias=True,
        biases=_input_bias("use_qkv_bias", False),
        has_head_dim=False,
        settings={
            **_PARTIAL,
            "layer_norm_eps": is_number,
            "use_qkv_bias": is_flag,
            **dict.fromkeys(("qk_layernorm", "use_parallel_residual"), one_of(False)),  # which change the norms
            "hidden_dropout": is_share,
        },
    ),
    "seed_oss": Architecture(
        biases=(
            *_input_bias("attention_bias", True),
            ("self_attn.o_proj", "attention_out_bias", False),
            ("mlp.", "mlp_bias", False),
        ),
        needs=("head_dim", "pad_token_id"),
        settings=_LLAMA | {"attention_out_bias": is_flag, "residual_dropout": is_share},
    ),
    "arcee": Architecture(
        block=(*_ATTENTION, ("mlp.up_proj", "inner", "hidden"), *_DOWN), biases=_LLAMA_BIAS, settings=_LLAMA
    ),
    "glm4": Architecture(
        block=(*_ATTENTION, *_JOINED_GATE),
        norms=(_BEFORE, _AFTER, "post_self_attn_layernorm", "post_mlp_layernorm"),
        biases=_input_bias("attention_bias", True),
        needs=("head_dim", "pad_token_id"),
        settings=_RMS | _BIAS | _PARTIAL,
    ),
}
