"""Attention on a CPU through the kernel of torch, with the shapes that it computes fast.

The kernel is slow for few positions of many heads, and takes heads with a shared key and value one by one.
When such heads are passed as positions of one head, the sums stay the same. For a single new token that is
several times faster. A prompt is computed in pieces, each with the keys up to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_on_cpu"  # registered with transformers
PIECE = 128  # positions of a prompt that are taken at a time
LONGEST = 1024  # prompt for which that is faster; `scripts/benchmark_decode.py --prompt N` measures it
# Compared with the attention of transformers. Some other models have special code for attention named "sdpa",
# and would skip it under another name.
MODELS = (
    "cohere2", "exaone4", "gemma3_text", "llama", "mistral", "olmo3", "phi3",
    "qwen2", "qwen3", "smollm3",
)  # fmt: skip


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as `transformers.integrations.sdpa_attention.sdpa_attention_forward` does.

    Shapes: query (B, H, T, D), key and value (B, H', L, D) with H' dividing H, mask (B, 1, T, L).
    The result is (B, T, H, D). That function computes all other cases, such as masks that differ between heads.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tokens, causal = query.shape[2], getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = any(others.get(name) for name in ("dropout", "softcap", "output_attentions"))
    way: Callable[..., torch.Tensor] | None
    if asked or query.device.type != "cpu" or _brings_tensors(others):
        way = None
    elif tokens == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
        way = _one_token
    elif attention_mask is None and causal and tokens == key.shape[2] and _suits_pieces(query, key, value):
        way = _prompt
    else:
        way = None
    if way is None:
        given = {"scaling": scaling, "is_causal": is_causal, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    return way(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _brings_tensors(others: dict) -> bool:
    return any(others.get(name) is not None for name in ("position_bias", "cache"))


def _suits_pieces(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return query.shape[1] > key.shape[1] and query.shape[2] <= LONGEST and key.shape[3] == value.shape[3]


def _one_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Compute attention of one token. No causal mask is needed, because no position lies in the future."""
    rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    if rows.shape[2] == 1 and query.dtype != torch.float32:
        rows = rows.expand(-1, -1, 2, -1)  # in half precision two rows take half the time of one
    result = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return result[:, :, : query.shape[1] // key.shape[1]].flatten(1, 2).unsqueeze(2)


def _prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Compute causal attention of all positions."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    result = torch.empty_like(query)
    for first in range(0, length, PIECE):
        last = min(first + PIECE, length)
        rows = query[:, :, first:last].reshape(batch, key.shape[1], -1, query.shape[3])
        mask = torch.ones(last - first, last, dtype=torch.bool).tril(first).repeat(groups, 1)
        piece = scaled_dot_product_attention(rows, key[:, :, :last], value[:, :, :last], attn_mask=mask, scale=scaling)
        result[:, :, first:last] = piece.view(batch, heads, last - first, -1)
    return result


def quicken_attention(model: PreTrainedModel) -> None:
    """Make a model on a CPU use this attention instead of the attention of torch."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    known = model.config.model_type in MODELS and model.config._attn_implementation == "sdpa"
    if known and model.device.type == "cpu":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
