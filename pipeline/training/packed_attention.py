"""Attention of packed sequences on a CPU, without a mask over the whole row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_ATTENTION = "packed_on_cpu"  # its name in transformers


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make each sequence in a packed row attend only to itself."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, _attend_packed)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


def _attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute sdpa attention for one row of packed sequences, sequence by sequence.

    Shapes: query (1, H, T, D), key and value (1, H', T, D), mask (1, 1, T, T) of booleans. `cu_seq_lens_q` has the
    positions at which sequences begin. Any other input goes to transformers' own function.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = others.get("cu_seq_lens_q")
    more = dropout or any(others.get(name) is not None for name in ("softcap", "position_bias"))
    packed = bounds is not None and len(query) == 1 and key.shape[2] == bounds[-1]
    if bounds is None or not packed or more or attention_mask is None or attention_mask.dtype != torch.bool:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    lengths = bounds.diff().tolist()
    sequences = zip(*(states.split(lengths, 2) for states in (query, key, value)), lengths, strict=True)
    parts, first = [], 0
    for q, k, v, length in sequences:
        rows = slice(first, first + length)
        shares = {"enable_gqa": query.shape[1] != key.shape[1]}
        mask = attention_mask[:, :, rows, rows]
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, **shares))
        first += length
    return torch.cat([part.transpose(1, 2) for part in parts], 1), None
