"""int4 linear layers on CUDA: the tensor-core kernel that torch carries, from sm80 on.

int8 needs nothing here: torchao's own tensor runs on CUDA.
"""

from __future__ import annotations

import torch

from pipeline.config.catalog import GROUP_SIZES
from pipeline.quantization.formats.tile_packed.format import from_tiles, to_tiles
from pipeline.quantization.formats.tile_packed.sizes import WIDTH_MULTIPLE
from pipeline.quantization.grid import GroupQuantized


def linear(weight: GroupQuantized, bias: torch.Tensor | None, device: torch.device) -> torch.nn.Module | None:
    """Return a layer for `weight`; None if this card has no kernel for it."""
    grid = weight.grid
    if grid.bits != 4 or grid.from_zero or grid.group_size not in GROUP_SIZES or grid.scale_dtype != torch.bfloat16:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return Int4Linear(weight, bias)


class Int4Linear(torch.nn.Module):
    """y = x W^T + b with W as int4 codes in tensor-core tiles, bfloat16 inputs.

    The buffers are those of `pipeline.quantization.formats.tile_packed`; padded columns meet inputs
    of zero. Packing needs no card, so a layer is made where its weight is, and moved.
    """

    packed: torch.Tensor
    scale_and_zero: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        assert weight.grid.group_size is not None, "int4 has groups"
        self.group_size = weight.grid.group_size
        self.grid = weight.grid
        packed, scale_and_zero = to_tiles(weight.with_float_zero())
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale_and_zero", scale_and_zero, persistent=False)
        self.register_buffer("bias", bias)

    def portable(self) -> GroupQuantized:
        """Return the codes, scales and zeros that the layer was made from."""
        shape = (self.out_features, self.in_features)
        return from_tiles(self.packed, self.scale_and_zero, shape, self.group_size).from_float_zero(self.grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., K) times the transposed weight, plus the bias: (..., N)."""
        flat = x.reshape(-1, self.in_features).to(torch.bfloat16)
        flat = torch.nn.functional.pad(flat, (0, -self.in_features % WIDTH_MULTIPLE)).contiguous()
        y = torch.ops.aten._weight_int4pack_mm(flat, self.packed, self.group_size, self.scale_and_zero)
        y = y[:, : self.out_features].to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
