"""int4 linear layers on CUDA: the tensor-core packing that torch carries, from sm80 on.

int8 needs nothing here: torchao's own tensor runs on CUDA.
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import GroupQuantized

INNER_K_TILES = 8
WIDTH_MULTIPLE = 1024  # the kernel wants whole tiles; narrower layers are padded
ROW_MULTIPLE = 8


def linear(weight: GroupQuantized, bias: torch.Tensor | None, device: torch.device) -> torch.nn.Module | None:
    """The layer for `weight`; None where this card or this shape has no kernel."""
    if weight.grid.bits != 4 or weight.grid.zero != "float" or weight.codes.shape[0] % ROW_MULTIPLE:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return Int4Linear(weight, bias, device)


class Int4Linear(torch.nn.Module):
    """y = x W^T + b with W as int4 codes in tensor-core tiles, bfloat16 inputs.

    Shapes: packed (N / 8, K' / 128, 32, 4) int32; scale_and_zero (K' / group, N, 2)
    bfloat16; K' is K rounded up to a multiple of 1024. Padded columns meet inputs of zero.
    """

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None, device: torch.device):
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.group_size = weight.grid.group_size
        self.padding = -self.in_features % WIDTH_MULTIPLE
        pad = torch.nn.functional.pad
        codes = pad((weight.codes - weight.grid.lowest).to(torch.uint8).to(device), (0, self.padding))
        nibbles = codes[:, 0::2] << 4 | codes[:, 1::2]  # here the even column is the high nibble
        groups = self.padding // self.group_size
        scale, zero = (pad(t.T.to(device, torch.bfloat16), (0, 0, 0, groups)) for t in (weight.scale, weight.zero))
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(nibbles.contiguous(), INNER_K_TILES))
        self.register_buffer("scale_and_zero", torch.stack((scale, zero), dim=-1).contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features).to(torch.bfloat16)
        flat = torch.nn.functional.pad(flat, (0, self.padding)).contiguous()
        y = torch.ops.aten._weight_int4pack_mm(flat, self.packed, self.group_size, self.scale_and_zero)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
