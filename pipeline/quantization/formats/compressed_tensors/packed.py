"""pack-quantized: integer codes in words of 32 bits; the inputs of layers are not rounded.

weight_packed    (N, K * bits / 32) int32, code + 2^(bits - 1), lowest bits first; a row ends with its last word
weight_shape     (2,) int64, N and K
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from pipeline.config.quantize import VariantSpec, matches
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.compressed_tensors import sizes
from pipeline.quantization.formats.compressed_tensors.format import SOME_ARE_KEPT, CompressedTensors, stored_as
from pipeline.quantization.grid import Grid, GroupQuantized

WORD = 32  # bits


class Packed(CompressedTensors):
    """Integer codes in words."""

    kinds = ((4, "integer"), (8, "integer"))

    def refuses_experts(self, spec: VariantSpec, names: Collection[str]) -> str | None:
        """Return a reason if an expert is kept: stock transformers takes all experts for packed ones."""
        return SOME_ARE_KEPT if any(matches(spec.keep, name) for name in names) else None

    def parts(self, shape: tuple[int, ...], grid: Grid) -> sizes.Parts:
        """Return the stored parts of a weight of `shape` (N, K)."""
        return sizes.packed_parts(shape, grid.bits, grid.group(shape[1]))

    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows as they are stored."""
        return {stored_as(name, "weight_packed"): pack(block.codes, block.grid.bits)}

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return the scales (N, G) and the shape of a whole weight of `shape` (N, K) as they are stored."""
        return super().rest(name, shape, scale, zero, grid) | {stored_as(name, "weight_shape"): torch.tensor(shape)}

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint holds in this format."""
        return [part.removesuffix("_packed") for part in checkpoint if part.endswith(".weight_packed")]

    def shape(self, checkpoint: StoredTensors, name: str) -> tuple[int, int]:
        """Return (N, K) of a stored weight."""
        rows, width = checkpoint.read(stored_as(name, "weight_shape")).tolist()
        return rows, width

    def codes(self, checkpoint: StoredTensors, name: str, width: int, grid: Grid) -> torch.Tensor:
        """Return the codes (N, K) of a stored weight with `width` columns."""
        return unpack(checkpoint.read(stored_as(name, "weight_packed")), grid.bits, width)


FORMAT = Packed()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes (N, K) of four or eight bits to words (N, K * bits / 32) int32, rounded up."""
    unsigned = (codes + (1 << bits - 1)).view(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (WORD // bits)))
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)  # torch's machines are little-endian


def unpack(words: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Unpack words of `pack` to signed codes (N, width) int8."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack((unsigned & 0xF, unsigned >> 4), dim=-1).flatten(1)
    return unsigned[:, :width].contiguous().view(torch.int8) - (1 << bits - 1)
