"""Models that are larger than the memory: the weights of a layer are read from the files when it computes.

Hooks of accelerate load the weights of a module before its forward pass and release them after it.
They come from a mapping that reads byte ranges of the checkpoint and dequantizes codes.
Nothing is unpacked to a folder first, and the memory in use is that of the widest layer.
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
    read,
    refuse_gaps,
    skeleton,
    tie_weights,
)
from pipeline.inference.kernels.plain import quicken_linears
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.checkpoint.row_blocks import tiles
from pipeline.models.checkpoint_files import stored_bytes
from pipeline.models.experts import is_expert
from pipeline.models.meta_model import computing_type, fill_buffers, put
from pipeline.models.safe_loading import open_config
from pipeline.quantization.formats import FileWeights, rounds_inputs, stored_weights
from pipeline.quantization.grid import GroupQuantized
from pipeline.system import hardware
from pipeline.system.hardware import WEIGHTS_SHARE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredWeights(Mapping[str, torch.Tensor]):
    """The weights of a model by name, read from the files at every access; nothing is kept."""

    def __init__(self, model: PreTrainedModel, checkpoint: Weights, quantized: Formats):
        self._model, self._checkpoint, self._quantized = model, checkpoint, quantized
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name not in self._checkpoint and name not in self._quantized:
            name = self._model.all_tied_weights_keys[name]
        if name in self._quantized:
            rows, width = shape
            return _dequantized(self._quantized[name].read(self._checkpoint, name, (rows, width)), self._model.dtype)
        return read(self._model, name, self._checkpoint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def assemble_offloaded(folder: Path, device: torch.device, weights: FileWeights | None = None) -> PreTrainedModel:
    """Return the model or variant in a folder, which computes on `device` with weights that stay in their files.

    Its layers are plain ones; those of a variant have dequantized weights.

    Args:
        weights: replace those in the folder.

    Raises:
        CheckpointError: if the files are damaged.
        ModelError: if the checkpoint has other tensor names than the model.
        OSError, ValueError: if transformers cannot use the configuration.
    """
    from accelerate import cpu_offload

    config = open_config(folder)
    if rounds_inputs(config):
        raise ModelError(
            f"{folder}: does not fit into the memory, and layers that round their inputs run only in a model that is "
            "loaded as a whole. Try: a machine with more memory"
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
        if name in quantized:
            continue
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
    """Return True if the weights stay in their files until they are needed."""
    return next(model.parameters()).is_meta


def fits(folder: Path, device: torch.device, free: int | None = None, stock: bool = False) -> bool:
    """Return True if the weights of a folder fit into the memory, with room to compute.

    Args:
        free: bytes that may be used; by default the free bytes of `device` now.
        stock: count the weights as stock transformers holds them, which dequantizes some formats.
    """
    free = hardware.free_bytes(device) if free is None else free
    return free is None or _held_bytes(folder, stock) <= WEIGHTS_SHARE * free


def _held_bytes(folder: Path, stock: bool = False) -> int:
    """Return the bytes of the weights in a folder while the model runs.

    Args:
        stock: as stock transformers holds them; else as `pipeline.load` does, which dequantizes single experts, and
            float8 to 16 bits.
    """
    config = open_config(folder)
    if getattr(config, "quantization_config", None) is None:
        return stored_bytes(folder)
    stock = stock or rounds_inputs(config)
    checkpoint = Checkpoint(folder)
    forms = stored_weights(checkpoint)
    coded = {part: name for name, form in forms.items() for part in form.part_names(name)}
    by_stock = {name for name in forms if stock or is_expert(name)}
    others = {part: info for part, info in checkpoint.items() if coded.get(part) not in by_stock}
    wide = sum(info.nbytes for part, info in others.items() if part in coded and info.dtype == torch.float8_e4m3fn)
    others_bytes = sum(info.nbytes for info in others.values()) + wide
    return others_bytes + sum(forms[name].stock_bytes(checkpoint, name) for name in by_stock)


class TooLarge(ModelError):
    """A model that does not fit into the memory as a whole."""


def check_fits(folder: Path, device: torch.device, why: str) -> None:
    """Raise if the weights of a folder do not fit into the memory as a whole.

    Args:
        why: the reason to hold all of them, in a few words.

    Raises:
        TooLarge: with their bytes and the free bytes.
    """
    free = hardware.free_bytes(device)
    if not fits(folder, device, free):
        other = " or evaluate.device: cpu" if device.type != "cpu" else ""
        raise TooLarge(
            f"{folder}: its weights take {_held_bytes(folder):,} bytes, and may take {WEIGHTS_SHARE:.0%} of the "
            f"{free:,} that are free ({device}); {why} needs them all at once: use a machine with more memory{other}"
        )


def _dequantized(weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight.dequantize(dtype)`, computed in blocks of rows, because it is computed in float32."""
    result = torch.empty(weight.shape, dtype=dtype)
    for first, stop in tiles(len(result), result.shape[1]):
        result[first:stop] = weight.rows(first, stop).dequantize(dtype)
    return result
