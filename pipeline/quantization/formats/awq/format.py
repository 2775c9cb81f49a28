"""AWQ, the version `gemm`: the format of AutoAWQ.

    qweight  (K, N / 8) int32, eight neighbouring rows to a number, the lowest bits first, in the order `ORDER`
    qzeros   (G, N / 8) int32, the zero points in the same order
    scales   (G, N) float16; value = (code - zero point) * scale, both from 0 to 15

The format does not say how weights are rounded. So any rounding that fills integer zeros will do.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import gate_modules, skipped_modules
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.awq import sizes
from pipeline.quantization.formats.safetensors import Grids
from pipeline.quantization.formats.torchao.format import pack_nibbles, unpack_nibbles
from pipeline.quantization.formats.transposed import Transposed, group_size, part
from pipeline.quantization.grid import Grid, GroupQuantized

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BACK = (0, 4, 1, 5, 2, 6, 3, 7)  # where each row of eight went


class Awq(Transposed):
    """Unsigned codes with a zero point for each group, packed along the rows of a weight."""

    sizes = sizes
    rows_grid = Grid(4, None, "integer", torch.float16, positive=True)

    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows (n, K) as they are stored, (K, n / 8)."""
        return {part(name, "qweight"): _pack(block.codes)}

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return scales and zeros (N, G) of a whole weight as they are stored."""
        assert zero is not None, "the grid has zeros"
        return {part(name, "qzeros"): _pack(zero), part(name, "scales"): scale.T.contiguous()}

    def quantization_config(
        self, spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str], grids: Grids, folder: Path
    ) -> dict:
        """Return the `quantization_config` of config.json."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": spec.variant.bits,
            "group_size": group_size(grids),
            "zero_point": True,
            "modules_to_not_convert": skipped_modules(folder, [*gate_modules(folder), *kept]),
        }

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> GroupQuantized:
        """Return the codes, scales and zeros of a stored weight, for a layer of `shape` (N, K)."""
        grid = self.stored_grid(checkpoint, name, shape)
        qweight, qzeros, scales = (checkpoint.read(stored) for stored in self.part_names(name))
        return GroupQuantized(_unpack(qweight), scales.T.contiguous(), _unpack(qzeros), grid)


FORMAT = Awq()


def _pack(numbers: torch.Tensor) -> torch.Tensor:
    """Pack unsigned numbers (N, M) of four bits to (M, N / 8) int32."""
    eights = numbers.T.reshape(numbers.shape[1], -1, sizes.CODES)
    return pack_nibbles(eights[..., ORDER].flatten(1)).view(torch.int32)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack (M, N / 8) int32 to the numbers (N, M) uint8 from 0 to 15: the inverse of `_pack`."""
    numbers = unpack_nibbles(packed.view(torch.int8)).view(torch.uint8) & 0xF
    return numbers.view(len(packed), -1, sizes.CODES)[..., _BACK].flatten(1).T.contiguous()
