"""One pass over a checkpoint, many variants out.

Every weight is read once, in blocks of rows; each block is rounded for every variant
that was asked for and goes to its place in that variant's files.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.catalog import VARIANTS
from pipeline.checkpoint import SHARD_BYTES, Checkpoint, CheckpointWriter
from pipeline.config import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.models import copy_companions, read_config
from pipeline.quantization.formats import storage
from pipeline.quantization.grid import Grid
from pipeline.quantization.rounding import rounding

BLOCK_ELEMENTS = 4_000_000  # weights rounded at a time


@dataclass(frozen=True)
class VariantFiles:
    """What was written for one variant, and how."""

    weight_bytes: int  # stored bytes of the quantized weights
    source_bytes: int  # bytes of the same weights in the source
    group_sizes: dict[str, int]  # layers whose group size is not the one asked for
    kept: tuple[str, ...]  # layers left as they were, because that was asked for


class _Variant:
    """One output of the pass: its grids, its open files, and the scales it still collects."""

    def __init__(self, spec: VariantSpec, folder: Path, source: Checkpoint, linear: Mapping[str, tuple], shard_bytes):
        self.spec, self.folder = spec, folder
        self.format = storage(VARIANTS[spec.name].format)
        self.round = rounding(spec.rounding)
        self.grids, self.kept = _grids(spec, linear)
        plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, info in source.items():
            if name in self.grids:
                plan |= self.format.plan(name, *self.grids[name])
            else:
                plan[name] = (info.dtype, info.shape)
        plain = [n for n in source if n not in self.grids]
        header = self.format.metadata(self.grids, plain, {n: source[n].dtype for n in self.grids})
        self.writer = CheckpointWriter(folder, plan, header, shard_bytes)
        self.weight_bytes = sum(
            dtype.itemsize * torch.Size(shape).numel()
            for name in self.grids
            for dtype, shape in self.format.plan(name, *self.grids[name]).values()
        )

    def take(self, name: str, weight: torch.Tensor, first_row: int, collected: list) -> None:
        """Round and write a block of rows; its scales and zeros are added to `collected`."""
        block = self.round(weight, self.grids[name][1])
        for part, tensor in self.format.rows(name, block).items():
            self.writer.write(part, tensor, first_row)
        collected.append((block.scale, block.zero))

    def finish(self, name: str, collected: list) -> None:
        scale = torch.cat([s for s, _ in collected])
        zero = None if collected[0][1] is None else torch.cat([z for _, z in collected])
        for part, tensor in self.format.rest(name, scale, zero).items():
            self.writer.write(part, tensor)

    def describe(self, source: Checkpoint) -> VariantFiles:
        asked = self.spec.group_size
        other = {n: g.group_size for n, (_, g) in self.grids.items() if asked and g.group_size != asked}
        before = sum(source[name].nbytes for name in self.grids)
        return VariantFiles(self.weight_bytes, before, other, tuple(self.kept))


def unfit(spec: VariantSpec, linear: Mapping[str, tuple[int, int]]) -> str | None:
    """Why a variant cannot be made of these weights, or None where it can."""
    try:
        _grids(spec, linear)
    except QuantizationError as error:
        return str(error)
    return None


def _grids(spec: VariantSpec, linear: Mapping[str, tuple[int, int]]) -> tuple[dict[str, tuple[tuple, Grid]], list[str]]:
    """The grid of every layer that is to be quantized, and the layers that were asked to stay as they are."""
    names = [n.removesuffix(".weight") for n in linear]
    for pattern in spec.keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise QuantizationError(f"{spec.name}: 'keep' names {pattern!r}, which no layer to be quantized matches")
    kept = sorted(n for n in linear if any(fnmatch.fnmatchcase(n.removesuffix(".weight"), p) for p in spec.keep))
    grids = {}
    for name in (n for n in linear if n not in kept):
        try:
            grids[name] = (linear[name], storage(VARIANTS[spec.name].format).grid(spec, linear[name][1]))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
    return grids, kept


def quantize_checkpoint(
    source: str | Path,
    specs: Sequence[VariantSpec],
    output: Mapping[str, Path],
    linear: Mapping[str, tuple[int, int]],
    on_progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, VariantFiles]:
    """Write every variant of a checkpoint in one pass.

    Args:
        source: folder of a full-precision checkpoint.
        specs: what to make; defaults filled in (`VariantSpec.resolved`).
        output: variant name -> folder to write into.
        linear: weights to quantize, name -> (N, K), as `models.linear_weights` finds them.
        on_progress: called with bytes done and bytes in all.

    Raises:
        QuantizationError: for a layer that the checkpoint lacks, that no group size
            divides, or whose weights are not finite. Nothing is left out silently.
    """
    source = Path(source)
    checkpoint = Checkpoint(source)
    for name, shape in linear.items():
        if name not in checkpoint or checkpoint[name].shape != tuple(shape):
            found = checkpoint[name].shape if name in checkpoint else "nothing"
            raise QuantizationError(f"{name}: the model has a linear layer of {tuple(shape)}, the checkpoint {found}")
    with ExitStack() as stack:
        variants = []
        for spec in specs:
            variants.append(_Variant(spec, Path(output[spec.name]), checkpoint, linear, shard_bytes))
            stack.enter_context(variants[-1].writer)
        done = 0
        for name, info in checkpoint.items():
            _pass_on(checkpoint, name, variants)
            done += info.nbytes
            if on_progress:
                on_progress(done, checkpoint.nbytes)
    config = read_config(source)
    for variant in variants:
        copy_companions(source, variant.folder)
        kept = [name.removesuffix(".weight") for name in variant.kept]
        content = {**config, "quantization_config": variant.format.quantization_config(variant.spec, kept)}
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (variant.folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return {variant.spec.name: variant.describe(checkpoint) for variant in variants}


def _pass_on(checkpoint: Checkpoint, name: str, variants: list[_Variant]) -> None:
    """Bring one tensor, block by block, to every variant: rounded where its grid is known, else as it is."""
    info = checkpoint[name]
    rows = info.shape[0] if info.shape else 1
    step = max(1, BLOCK_ELEMENTS * info.dtype.itemsize // max(info.row_bytes, 1)) if info.shape else 1
    collected: dict[str, list] = {v.spec.name: [] for v in variants}
    for first in range(0, rows, step):
        block = checkpoint.read_rows(name, first, min(first + step, rows)) if info.shape else checkpoint.read(name)
        rounded = [v for v in variants if name in v.grids]
        if rounded and not block.isfinite().all():
            raise QuantizationError(f"{name}: has values that are not finite; the model is broken")
        for variant in variants:
            if name in variant.grids:
                variant.take(name, block, first, collected[variant.spec.name])
            else:
                variant.writer.write(name, block, first)
    for variant in variants:
        if name in variant.grids:
            variant.finish(name, collected[variant.spec.name])
