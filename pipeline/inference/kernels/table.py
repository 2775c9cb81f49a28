"""An embedding with int8 codes: only the rows that are looked up are dequantized."""

from __future__ import annotations

import torch

from pipeline.quantization.grid import GroupQuantized


class Int8Embedding(torch.nn.Module):
    """Rows of a table (V, H) of int8 codes with one scale a row, in `dtype`; on any device.

    The tensor of torchao dequantizes the whole table at every look-up.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: GroupQuantized, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.codes.shape
        self.grid, self.dtype = weight.grid, dtype
        self.register_buffer("codes", weight.codes, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows (..., H) with these numbers (...)."""
        return (self.codes[ids] * self.scale[ids]).to(self.dtype)  # the scales are float32, and so is the product

    def portable(self) -> GroupQuantized:
        """Return the codes and scales that the layer was made from."""
        return GroupQuantized(self.codes, self.scale.to(self.grid.scale_dtype), None, self.grid)

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
