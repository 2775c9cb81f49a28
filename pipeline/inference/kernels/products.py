"""Matrix products in float32 for machines that have no fast instructions for bfloat16.

A product of many rows is arithmetic. Without bfloat16 instructions torch does it by reference code, so that converting
both sides to float32 first is 5 to 200 times faster. A weight is converted in blocks of rows that fit in the cache, so
that it is never in memory twice.
"""

from __future__ import annotations

import torch

from pipeline.system import hardware

# Rows up to which a product in half precision is faster than converting the weight to float32.
# `scripts/benchmark_decode.py --layers` measures it.
FEW_ROWS = 4
BLOCK_ELEMENTS = 1 << 20  # weights converted at a time: 4 MB of float32
ROW_MULTIPLE = 64


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a CPU multiplies many rows of `dtype` fast: `dtype` itself, or else float32."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and dtype != hardware.compute_dtype("cpu") else dtype


def float32_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (T, K) times the transposed weight (N, K), both float32: (T, N) float32.

    On a CPU this asks oneDNN. torch asks MKL for float32, which takes up to twice the time on processors that are
    not Intel's.
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def row_blocks(rows: int, width: int, elements: int | None = None) -> list[slice]:
    """Return slices over `rows` of a weight of that width, each at most `elements` weights (`BLOCK_ELEMENTS`)."""
    elements = BLOCK_ELEMENTS if elements is None else elements
    step = max(ROW_MULTIPLE, elements // width // ROW_MULTIPLE * ROW_MULTIPLE)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def many_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, elements: int | None = None
) -> torch.Tensor:
    """Return x (T, K) times the transposed weight (N, K) plus bias (N), on a CPU, in the type of `x`: (T, N).

    If this machine has no fast product for that type, blocks of the weight are converted to float32. Every sum and its
    bias stay in float32 until the result is rounded once. The product cannot be differentiated.

    Args:
        elements: the largest number of weights in a block (`BLOCK_ELEMENTS`).
    """
    dtype = product_dtype(x.dtype)
    if dtype != torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    if weight.dtype == torch.float32:
        y = float32_product(x, weight)
        return y if bias is None else y.add_(bias)
    x32, blocks = x.float(), row_blocks(len(weight), weight.shape[1], elements)
    if len(blocks) == 1:
        y = float32_product(x32, weight.float())
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    y = x.new_empty(len(x), len(weight))
    room = torch.empty(blocks[0].stop, weight.shape[1])
    for rows in blocks:
        part = float32_product(x32, room[: rows.stop - rows.start].copy_(weight[rows]))
        y[:, rows] = part if bias is None else part.add_(bias[rows])
    return y
