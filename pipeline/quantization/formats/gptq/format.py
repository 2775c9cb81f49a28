"""GPTQ, version 1, symmetric: the format of AutoGPTQ and gptqmodel.

    qweight  (K / 8, N) int32, eight neighbouring columns to a number, the first in its lowest bits; code + 8
    qzeros   (G, N / 8) int32, eight neighbouring rows to a number; the zero point less one, so always 7
    scales   (G, N) float16; value = code * scale
    g_idx    (K,) int32, the group of each column

This version cannot store a zero point of 0, so asymmetric codes do not fit into it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError
from pipeline.models.matrices import gate_modules
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.gptq import sizes
from pipeline.quantization.formats.safetensors import Grids
from pipeline.quantization.formats.torchao.format import pack_nibbles, unpack_nibbles
from pipeline.quantization.formats.transposed import Transposed, group_size, part
from pipeline.quantization.grid import Grid, GroupQuantized

ZEROS = 0x77777777  # eight times 8 - 1


class Gptq(Transposed):
    """Symmetric codes, packed along the columns of a weight."""

    sizes = sizes
    rows_grid = Grid(4, None, "none", torch.float16, positive=True)

    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows (n, K) as they are stored, (K / 8, n)."""
        return {part(name, "qweight"): pack_nibbles(block.codes + 8).view(torch.int32).T.contiguous()}

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return scales (N, G) of a whole weight, its zeros, and the group of each column, as they are stored."""
        rows, groups = scale.shape
        return {
            part(name, "qzeros"): torch.full((groups, rows // sizes.CODES), ZEROS, dtype=torch.int32),
            part(name, "scales"): scale.T.contiguous(),
            part(name, "g_idx"): _groups(shape[1], grid),
        }

    def quantization_config(
        self, spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str], grids: Grids, folder: Path
    ) -> dict:
        """Return the `quantization_config` of config.json.

        Layers that are not quantized are said twice: gptqmodel and servers read `dynamic`, transformers the other key.
        """
        others, said = [*gate_modules(folder), *kept], dict[str, Any]()
        if others:
            said["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in others}
            said["modules_in_block_to_quantize"] = [[name.removesuffix(".weight") for name in grids]]
        return {
            **said,
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": spec.variant.bits,
            "group_size": group_size(grids),
            "sym": True,
            "desc_act": False,
            "true_sequential": True,
            "lm_head": False,
        }

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> GroupQuantized:
        """Return the codes and scales of a stored weight, for a layer of `shape` (N, K)."""
        grid = self.stored_grid(checkpoint, name, shape)
        qweight, qzeros, scales, g_idx = (checkpoint.read(stored) for stored in self.part_names(name))
        if bool((qzeros != ZEROS).any()) or not torch.equal(g_idx, _groups(shape[1], grid)):
            raise CheckpointError(f"{name}: has zero points or reordered columns, which tunepress does not read")
        codes = unpack_nibbles(qweight.T.contiguous().view(torch.int8)).bitwise_xor_(-8)
        return GroupQuantized(codes, scales.T.contiguous(), None, grid)


FORMAT = Gptq()


def _groups(width: int, grid: Grid) -> torch.Tensor:
    """Return the group of each column, (K,) int32."""
    return torch.arange(width, dtype=torch.int32) // grid.group(width)
