"""How a weight is put on a grid. Every rounding is `round_weight(weight, grid)`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.roundings import hqq, rtn, search

Rounding = Callable[[torch.Tensor, Grid], GroupQuantized]

_ROUNDINGS: dict[str, Rounding] = {"rtn": rtn.round_weight, "hqq": hqq.round_weight, "search": search.round_weight}


def rounding(name: str) -> Rounding:
    """The rounding of that name in the catalog; it takes (N, K) weights, any rows of them."""
    return _ROUNDINGS[name]
