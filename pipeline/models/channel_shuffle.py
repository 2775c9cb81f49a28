"""Reordering of channels, so that dequantized weights leave their grid without changing the model.

Weights dequantized from Q4_1 lie on a grid of 16 steps in blocks of 32 columns. int4 with the same blocks would look
lossless, and would round the small changes of a fine-tune back to where they came from. Reordering channels keeps every
function the network computes and mixes the blocks, so that int4 does here what it does to any model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HANDLED = ("llama",)


@torch.no_grad()
def reorder_channels(model: PreTrainedModel, seed: int = 0) -> None:
    """Permute the residual stream, the MLP's channels and the value heads' channels, in place.

    The outputs stay the same up to the rounding of sums that are taken in another order.

    Raises:
        ValueError: for an architecture whose layout is not known here.
    """
    whole: Any = model  # transformers declares no types for the parts of a model
    config = whole.config
    if config.model_type not in HANDLED:
        raise ValueError(f"{config.model_type}: the layout is not known; known are {', '.join(HANDLED)}")
    generator = torch.Generator().manual_seed(seed)

    def shuffled(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator)

    def rows(order: torch.Tensor, *parameters: torch.nn.Parameter | None) -> None:
        for parameter in parameters:
            if parameter is not None:
                parameter.copy_(parameter[order])

    def columns(order: torch.Tensor, *weights: torch.nn.Parameter) -> None:
        for weight in weights:
            weight.copy_(weight[:, order])

    stream = shuffled(config.hidden_size)
    inner = whole.model
    columns(stream, inner.embed_tokens.weight)
    if not config.tie_word_embeddings:
        columns(stream, whole.lm_head.weight)
    rows(stream, inner.norm.weight)
    sharing = config.num_attention_heads // config.num_key_value_heads  # query heads on one value head
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        rows(stream, layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        columns(stream, *(m.weight for m in (attention.q_proj, attention.k_proj, attention.v_proj)))
        columns(stream, mlp.gate_proj.weight, mlp.up_proj.weight)
        rows(stream, attention.o_proj.weight, attention.o_proj.bias, mlp.down_proj.weight, mlp.down_proj.bias)

        channels = shuffled(config.intermediate_size)
        rows(channels, mlp.gate_proj.weight, mlp.gate_proj.bias, mlp.up_proj.weight, mlp.up_proj.bias)
        columns(channels, mlp.down_proj.weight)

        width = config.head_dim
        within = torch.stack([shuffled(width) for _ in range(config.num_key_value_heads)])
        value = (within + torch.arange(config.num_key_value_heads)[:, None] * width).flatten()
        heads = torch.arange(config.num_attention_heads)[:, None]
        output = (within.repeat_interleave(sharing, dim=0) + heads * width).flatten()
        rows(value, attention.v_proj.weight, attention.v_proj.bias)
        columns(output, attention.o_proj.weight)
