"""int-quantized with static inputs: one scale for all inputs of a layer, from calibration text.

weight         (N, K) int8
input_scale    (1,) bfloat16; layers with the same input have the same one
"""

from __future__ import annotations

import torch

from pipeline.errors import QuantizationError
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.compressed_tensors import sizes
from pipeline.quantization.formats.compressed_tensors.format import stored_as
from pipeline.quantization.formats.compressed_tensors.unpacked import Unpacked
from pipeline.quantization.grid import Grid
from pipeline.quantization.statistics import Statistics


class Static(Unpacked):
    """Integers of eight bits, and scales of inputs."""

    kinds = ((8, "integer"),)

    def parts(self, shape: tuple[int, ...], grid: Grid) -> sizes.Parts:
        """Return the stored parts of a weight of `shape` (N, K)."""
        return super().parts(shape, grid) | sizes.INPUTS

    def of_inputs(self, name: str, statistics: Statistics | None) -> dict[str, torch.Tensor]:
        """Return the scale of the inputs as it is stored.

        Raises:
            QuantizationError: if the calibration text never reached the layer.
        """
        if statistics is None or statistics.range is None:
            raise QuantizationError(
                f"{name}: the calibration text never reached this layer, and static inputs need their range. "
                f"Try: keep: [{name.removesuffix('.weight')}]"
            )
        return {stored_as(name, "input_scale"): torch.tensor([statistics.range.scale()], dtype=torch.bfloat16)}

    def holds(self, checkpoint: StoredTensors, name: str) -> bool:
        """Return True if a weight is stored with the scale of its inputs."""
        return stored_as(name, "input_scale") in checkpoint


FORMAT = Static()
