"""A format from one file: weights become their signs times one scale a row, in an ordinary checkpoint of bf16.

It takes weights directly, so it has no grid and no rounding, and stock transformers opens what it writes.
"""

from __future__ import annotations

import math
import shutil

from pipeline.config import catalog
from pipeline.quantization import formats

NAME = "signs"


def register() -> None:
    """Add the format, and its variant of the same name."""
    formats.register(NAME, __name__)
    catalog.register(
        catalog.Variant(
            name=NAME,
            format=NAME,
            bits=1,
            group_size=None,
            roundings=(),
            rise=100.0,
            group_sizes=(),
            libraries=("torch",),
            said="linear layers are signs, one scale for each row",
        )
    )


def layer_bytes(spec, shape):
    return 2 * math.prod(shape)


def table_bytes(spec, shape):
    return 2 * math.prod(shape)


def plain_bytes(spec, shape, item_bytes):
    return item_bytes * math.prod(shape)


def __getattr__(name: str):
    """Make the part that needs torch when it is first asked for."""
    if name != "FORMAT":
        raise AttributeError(name)
    from pipeline.models.checkpoint import CheckpointWriter
    from pipeline.models.checkpoint_files import copy_companions
    from pipeline.quantization.layers import Output, VariantFiles

    class SignsFolder(Output):
        def __init__(self, spec, folder, source):
            self.spec, self.folder, self.source = spec, folder, source
            plan = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
            self.writer = CheckpointWriter(folder, plan, {}, source.shard_bytes)

        def __enter__(self):
            self.writer.__enter__()
            return self

        def __exit__(self, kind, error, trace):
            self.writer.__exit__(kind, error, trace)

        def rounds(self, name):
            return name in self.source.linear

        def together(self, name):
            return 1

        def take(self, name, rows, first):
            if name in self.source.linear:
                rows = (rows.float().abs().mean(1, keepdim=True) * rows.float().sign()).to(rows.dtype)
            self.writer.write(name, rows, first)

        def finish(self, model, tell=None):
            copy_companions(model, self.folder)
            shutil.copyfile(model / "config.json", self.folder / "config.json")

        def describe(self):
            count = sum(self.source.tensors[name].nbytes for name in self.source.linear)
            return VariantFiles(count, count, 0, {}, (), {})

    class Signs(formats.Format):
        TABLE = None

        def grid(self, spec, width):
            return None

        def output(self, spec, folder, source, others):
            return SignsFolder(spec, folder, source)

    return globals().setdefault(name, Signs())
