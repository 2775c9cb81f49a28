"""Where codes are stored. Each format is a module with the same few functions.

grid(spec, width)                the grid of a layer with `width` columns
plan(name, shape, grid)          the stored tensors of a weight, before any is written
rows(name, block)                what a block of rows gives at once
rest(name, scale, zero)          what is stored once the whole weight is known
metadata(grids, plain, dtypes)   what every file's header carries
quantization_config(spec, kept)  what config.json carries
unpack(weight)                   a loaded weight as GroupQuantized
"""

from __future__ import annotations

from types import ModuleType

from pipeline.quantization.formats import torchao

_FORMATS: dict[str, ModuleType] = {"torchao": torchao}


def storage(name: str) -> ModuleType:
    """The format of that name in the catalog."""
    return _FORMATS[name]
