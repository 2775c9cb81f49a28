"""Attention of packed sequences on a CPU: each sequence attends to itself, without a mask over the whole row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_ATTENTION = "packed_on_cpu"  # the name that transformers knows it by


def quicken_packed_attention(model: PreTrainedModel) -> None:
    """Let each sequence that is packed with others into one row attend to itself alone."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, _attend_packed)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


def _attend_packed(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """Compute what transformers' sdpa attention computes for one row of packed sequences, sequence by sequence.

    Shapes: query (1, H, T, D), key and value (1, H', T, D), mask (1, 1, T, T) of booleans. `cu_seq_lens_q` tells where
    sequences begin. Anything else goes to transformers' own function.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = others.get("cu_seq_lens_q")
    asked = dropout or any(others.get(name) is not None for name in ("softcap", "position_bias"))
    packed = bounds is not None and len(query) == 1 and attention_mask is not None and key.shape[2] == bounds[-1]
    if not packed or asked or attention_mask.dtype != torch.bool:
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
