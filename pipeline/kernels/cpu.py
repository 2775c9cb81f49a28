"""int8 and int4 linear layers on a CPU, on the kernels that torch carries.

For a few tokens the time is that of reading the weights, so fewer bytes are faster;
for many it is arithmetic, and turning the weights back into bf16 once is cheaper.
"""

from __future__ import annotations

import torch

from pipeline.quantization.grid import GroupQuantized

# Tokens from which dequantize-and-multiply is the faster way for int8 (4096 x 4096, AVX-512).
INT8_KERNEL_TOKENS = 64
_INT4_ROW_BLOCK = 16  # `_convert_weight_to_int4pack_for_cpu` takes multiples of this
# `_weight_int8pack_mm` reads whole vectors from aligned addresses and checks neither: a width
# that is no multiple of this gives wrong numbers, and codes at an odd address end the process.
_INT8_WIDTH_BLOCK = 32
_ALIGNMENT = 64  # bytes; what torch's own allocations have, and tensors mapped from a file have not


def linear(weight: GroupQuantized, bias: torch.Tensor | None) -> torch.nn.Module | None:
    """The layer for `weight`'s grid; None where torch has no kernel for it."""
    (rows, width), grid = weight.codes.shape, weight.grid
    if grid.bits == 8 and grid.zero == "none" and grid.group_size is None and width % _INT8_WIDTH_BLOCK == 0:
        return Int8Linear(weight, bias)
    if grid.bits == 4 and grid.zero == "float" and rows % _INT4_ROW_BLOCK == 0:
        return Int4Linear(weight, bias)
    return None


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, contiguous and where the kernels can read it; copied only if it is not."""
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class Int8Linear(torch.nn.Module):
    """y = x W^T + b with W as int8 codes (N, K) and one scale per row.

    The scales, float32 in the file, are used in the input's type. torchao computes them
    in the weights' type, so for a bf16 model they are bf16 numbers and nothing is lost.
    """

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("codes", _aligned(weight.codes))
        self.register_buffer("scale", _aligned(weight.scale.view(-1)))
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = _aligned(x.reshape(-1, self.in_features))
        scale = self.scale.to(x.dtype)
        if flat.shape[0] <= INT8_KERNEL_TOKENS:
            y = torch.ops.aten._weight_int8pack_mm(flat, self.codes, scale)
        elif x.dtype == torch.float16:  # unscaled sums can exceed its range
            y = torch.nn.functional.linear(flat, self.codes.to(x.dtype) * scale.unsqueeze(-1))
        else:
            y = torch.nn.functional.linear(flat, self.codes.to(x.dtype)) * scale
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int4Linear(torch.nn.Module):
    """y = x W^T + b with W as int4 codes packed for this processor, scale and zero per group.

    Shapes: packed (N, K / 2) uint8, opaque; scale_and_zero (K / group, N, 2) bfloat16.
    """

    def __init__(self, weight: GroupQuantized, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.group_size = weight.grid.group_size
        unsigned = weight.codes.to(torch.int32) - weight.grid.lowest
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1))
        self.register_buffer("scale_and_zero", torch.stack((weight.scale.T, weight.zero.T), dim=-1).contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = _aligned(x.reshape(-1, self.in_features))
        scale_and_zero = self.scale_and_zero.to(x.dtype)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group_size, scale_and_zero)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
