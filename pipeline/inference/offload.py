"""Models that are larger than the memory: each layer's weights are read from the files when it computes.

accelerate's hooks bring a module its weights before its forward pass and take them away after it.
Where they come from is a mapping of ours, which reads byte ranges of the checkpoint and turns a
variant's codes into the numbers they mean: nothing is unpacked to a folder first, and the
memory in use is that of the widest layer, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.errors import ModelError
from pipeline.inference.assemble import (
    Formats,
    Weights,
    computing_type,
    fill_buffers,
    put,
    read,
    refuse_gaps,
    skeleton,
    tie_weights,
)
from pipeline.inference.kernels.plain import quicken_linears
from pipeline.models.checkpoint.row_blocks import tiles
from pipeline.models.checkpoint_files import stored_bytes
from pipeline.models.safe_loading import open_config
from pipeline.quantization.formats import FileWeights, rounds_inputs
from pipeline.quantization.grid import GroupQuantized
from pipeline.system import hardware
from pipeline.system.hardware import WEIGHTS_SHARE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredWeights(Mapping[str, torch.Tensor]):
    """A model's weights by name, read anew whenever one is asked for; nothing is kept."""

    def __init__(self, model: PreTrainedModel, checkpoint: Weights, quantized: Formats):
        self._model, self._checkpoint, self._quantized = model, checkpoint, quantized
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name not in self._checkpoint and name not in self._quantized:
            name = self._model.all_tied_weights_keys[name]
        if name in self._quantized:
            return _dequantized(self._quantized[name].read(self._checkpoint, name, shape), self._model.dtype)
        return read(self._model, name, self._checkpoint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def assemble_offloaded(folder: Path, device: torch.device, weights: FileWeights | None = None) -> PreTrainedModel:
    """The model or the variant in a folder, computing on `device` with weights that stay in their files.

    It computes with plain layers: those of a variant have the dequantized weights.

    Args:
        weights: in the place of those in the folder.

    Raises:
        CheckpointError: where the files are damaged.
        ModelError: where the checkpoint names its tensors otherwise than the model does.
        OSError, ValueError: whatever transformers says of a configuration that it cannot use.
    """
    from accelerate import cpu_offload

    config = open_config(folder)
    if rounds_inputs(config):
        raise ModelError(
            f"{folder}: does not fit into the memory, and torchao computes layers that round what they "
            "are given only where the model is whole; use a machine with more memory"
        )
    built = skeleton(folder, config, weights)
    if built is None:
        raise ModelError(
            f"{folder}: does not fit into the memory, and cannot be read piece by piece, for its checkpoint names its "
            "tensors otherwise than the model does; use a machine with more memory"
        )
    model, checkpoint, quantized = built
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in model.state_dict():
        if name in parameters and name in checkpoint:
            dtype = computing_type(model, name, checkpoint[name].dtype)
            put(model, name, torch.empty_like(parameters[name], dtype=dtype))
        elif name in checkpoint:
            put(model, name, read(model, name, checkpoint).to(device))
    tie_weights(model, checkpoint.keys() | quantized.keys())
    fill_buffers(model, device)
    refuse_gaps(folder, model.named_buffers())
    if device.type == "cpu":
        quicken_linears(model)  # before the hooks, which keep each layer's forward
    return cpu_offload(model, device, state_dict=StoredWeights(model, checkpoint, quantized))


def is_offloaded(model: torch.nn.Module) -> bool:
    """Do the weights stay in their files until they are needed?"""
    return next(model.parameters()).is_meta


def fits(folder: Path, device: torch.device, free: int | None = None) -> bool:
    """Can the weights of a folder be held in memory, and still be computed with?

    Args:
        free: bytes that may be used; by default what `device` has free now.
    """
    free = hardware.free_bytes(device) if free is None else free
    return free is None or stored_bytes(folder) <= WEIGHTS_SHARE * free


class TooLarge(ModelError):
    """A model that has to be in the memory as a whole does not fit into it."""


def check_fits(folder: Path, device: torch.device, why: str) -> None:
    """Raise where the weights of a folder cannot be held in memory as a whole.

    Args:
        why: what needs them so, in a few words.

    Raises:
        TooLarge: naming their bytes and those that are free.
    """
    free = hardware.free_bytes(device)
    if not fits(folder, device, free):
        other = " or evaluate.device: cpu" if device.type != "cpu" else ""
        raise TooLarge(
            f"{folder}: its weights take {stored_bytes(folder):,} bytes, and may take {WEIGHTS_SHARE:.0%} of the "
            f"{free:,} that are free ({device}); {why} needs them all at once: use a machine with more memory{other}"
        )


def _dequantized(weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
    """`weight.dequantize(dtype)`, in blocks of rows, for it is computed in float32."""
    result = torch.empty(weight.codes.shape, dtype=dtype)
    for first, stop in tiles(*weight.codes.shape):
        result[first:stop] = weight.rows(first, stop).dequantize(dtype)
    return result
