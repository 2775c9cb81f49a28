"""Tiny random models of many architectures, made from their configurations alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 5_000_000  # parameters of a tiny model

# Sizes by all the names that architectures have for them.
_SIZES: dict[str, Any] = {
    "vocab_size": 272,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_head", "rotary_dim"), 16),
    "word_embed_proj_dim": 64,
    "mamba_n_heads": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
}
_OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": None},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 2, "block_types": ["recurrent", "attention"]},
}


def build(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny random model of an architecture, in float32; skip the test if there is none.

    Args:
        kind: its name in transformers.
        seed: of the weights.
        changes: settings of the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {kind}")
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    config = AutoConfig.for_model(kind, **{**sizes, **_OTHERS.get(kind, {}), **changes})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        pytest.skip(f"{kind}: has {size} parameters at these sizes")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0 and norms at 1, and would hide what goes wrong with them
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
