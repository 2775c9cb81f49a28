"""Where codes are stored. Each format is a module; all of them have

grid(spec, width)                the grid of a layer with `width` columns
check(spec, folder)              raises where a model cannot be stored so
TABLE                            the grid of embeddings and output heads, where they are quantized

Formats of safetensors (`torchao`, `tile_packed`), which `pipeline.quantization.safetensors_output` writes, also have

together(grid)                   rows of a weight in one row of its stored codes
plan(name, shape, grid)          the stored tensors of a weight, before any is written
rows(name, block)                what a block of rows gives at once
rest(name, scale, zero, grid)    what is stored once the whole weight is known
metadata(spec, grids, ...)       what every file's header carries
quantization_config(...)         what config.json carries
part_names(name)                 the names of a weight's stored tensors
read(checkpoint, name, shape)    a stored weight as GroupQuantized
unpack(weight)                   the same of a weight that transformers loaded
tensor(weight, dtype)            the inverse of `unpack`

`gguf` is a file of its own kind, which `pipeline.quantization.formats.gguf.file` writes and its module `reader` reads.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pipeline.config.schema import VariantSpec
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.formats import gguf, tile_packed, torchao
from pipeline.quantization.grid import GroupQuantized

_SAFETENSORS: dict[str, ModuleType] = {"torchao": torchao, "tile_packed": tile_packed}


def storage(name: str) -> ModuleType:
    """The format of that name in the catalog, or of a packing that is a format of its own."""
    return gguf if name == "gguf" else _SAFETENSORS[name]


def format_of(spec: VariantSpec) -> ModuleType:
    """The format that a variant is written in."""
    return storage(spec.format)


def stored_weights(checkpoint: Checkpoint) -> dict[str, ModuleType]:
    """The quantized weights that a checkpoint holds: name -> the format that each is in."""
    ends = {part.rpartition("._weight_qdata")[0] for part in checkpoint if part.endswith("._weight_qdata")}
    names = [f"{module}.weight" for module in ends]
    return {n: tile_packed if set(tile_packed.part_names(n)) <= checkpoint.keys() else torchao for n in names}


def unpack(weight: torch.Tensor) -> tuple[GroupQuantized, ModuleType] | None:
    """A weight as transformers loaded it, as portable codes, and the format that it was in; None for others."""
    found = ((form.unpack(weight), form) for form in _SAFETENSORS.values())
    return next((entry for entry in found if entry[0] is not None), None)
