"""Matrix products in float32 for machines that have no fast instructions for bfloat16.

A product of many rows is arithmetic. Without bfloat16 instructions torch does it by reference code, so that converting
both sides to float32 first is 5 to 200 times faster. A weight is converted in blocks of rows that fit in the cache, so
that it is never in memory twice.
"""

from __future__ import annotations

import torch

BLOCK_ELEMENTS = 1 << 19  # weights converted at a time: 2 MB of float32
ROW_MULTIPLE = 64


def float32_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (T, K) times the transposed weight (N, K), both float32: (T, N) float32.

    On a CPU this asks oneDNN. torch asks MKL for float32, which takes up to twice the time on processors that are
    not Intel's.
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def row_blocks(rows: int, width: int) -> list[slice]:
    """Return slices over `rows` of a weight of that width, each at most `BLOCK_ELEMENTS` weights."""
    step = max(ROW_MULTIPLE, BLOCK_ELEMENTS // width // ROW_MULTIPLE * ROW_MULTIPLE)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
