"""int-quantized and float-quantized: one code a byte, and layers that may round their inputs too.

weight    (N, K) int8 or float8_e4m3fn
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from pipeline.config.quantize import VariantSpec, matches
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.compressed_tensors import sizes
from pipeline.quantization.formats.compressed_tensors.format import SOME_ARE_KEPT, CompressedTensors, stored_as
from pipeline.quantization.grid import Grid, GroupQuantized


class Unpacked(CompressedTensors):
    """Codes of eight bits, one a byte."""

    kinds: tuple[tuple[int, str], ...] = ((8, "integer"), (8, "e4m3"))

    def refuses_experts(self, spec: VariantSpec, names: Collection[str]) -> str | None:
        """Return a reason for integers: stock transformers stacks the experts of packed codes and of floats only."""
        if spec.variant.values == "integer":
            return "stock transformers cannot load a mixture of experts so"
        kept = [name for name in names if matches(spec.keep, name)]
        return super().refuses_experts(spec, names) if len(kept) in (0, len(names)) else SOME_ARE_KEPT

    def parts(self, shape: tuple[int, ...], grid: Grid) -> sizes.Parts:
        """Return the stored parts of a weight of `shape` (N, K)."""
        return sizes.unpacked_parts(shape, str(grid.code_dtype).removeprefix("torch."), grid.group(shape[1]))

    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows as they are stored."""
        return {name: block.codes}

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint holds in this format."""
        dtypes = (torch.int8, torch.float8_e4m3fn)
        names = (part.removesuffix("_scale") for part in checkpoint if part.endswith(".weight_scale"))
        codes = [name for name in names if name in checkpoint and checkpoint[name].dtype in dtypes]
        return [name for name in codes if self.holds(checkpoint, name)]

    def holds(self, checkpoint: StoredTensors, name: str) -> bool:
        """Return True if a weight is stored without the scale of its inputs."""
        return stored_as(name, "input_scale") not in checkpoint

    def shape(self, checkpoint: StoredTensors, name: str) -> tuple[int, int]:
        """Return (N, K) of a stored weight."""
        rows, width = checkpoint[name].shape
        return rows, width

    def codes(self, checkpoint: StoredTensors, name: str, width: int, grid: Grid) -> torch.Tensor:
        """Return the codes (N, K) of a stored weight with `width` columns."""
        return checkpoint.read(name)


FORMAT = Unpacked()
