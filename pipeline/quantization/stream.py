"""One pass over a model's tensors, many variants out.

Every weight comes by once, in blocks of rows; each block is rounded for every variant
that was asked for and goes to its place in that variant's files. All cores work on
blocks of their own (`pipeline.blocks`), and the bytes do not depend on who was first.
The tensors are a checkpoint's, or come out of a merge (`pipeline.merging`).
"""

from __future__ import annotations

import fnmatch
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch

from pipeline.blocks import Take, are_finite, blocks_of, in_disk_order, in_parallel, tiles
from pipeline.checkpoint import SHARD_BYTES, Checkpoint, CheckpointWriter, TensorInfo
from pipeline.config import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.models import copy_companions, read_config
from pipeline.quantization.formats import format_of
from pipeline.quantization.grid import Grid
from pipeline.quantization.rounding import rounding

Tensors = Mapping[str, TensorInfo]  # the full-precision model, by dtypes and shapes
Shapes = Mapping[str, tuple[int, int]]  # name of a weight -> (N, K)
nearest = rounding("rtn")
ROUNDED_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class VariantFiles:
    """What was written for one variant, and how."""

    weight_bytes: int  # stored bytes of the quantized weights
    source_bytes: int  # bytes of the same weights in the source
    padding_bytes: int  # those of them that only fill up the tiles of a packing
    group_sizes: dict[str, int]  # layers whose group size is not the one asked for
    kept: tuple[str, ...]  # layers left as they were, because that was asked for


class _Variant:
    """One output of the pass: its grids, its open files, and the scales it still collects."""

    def __init__(
        self, spec: VariantSpec, folder: Path, source: Tensors, linear: Shapes, tables: Shapes, shard_bytes: int
    ):
        self.spec, self.folder = spec, folder
        self.format = format_of(spec)
        self.round = rounding(spec.rounding)
        self.grids, self.kept = _grids(spec, linear)
        self.tables = sorted(tables) if spec.embeddings == "int8" else []
        self.grids |= {name: (tables[name], self.format.TABLE) for name in self.tables}
        self._scales: dict[str, dict[int, tuple]] = {}  # of weights whose last rows are not there yet
        self._lock = threading.Lock()
        plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, info in source.items():
            if name in self.grids:
                plan |= self.format.plan(name, *self.grids[name])
            else:
                plan[name] = (info.dtype, info.shape)
        plain = [n for n in source if n not in self.grids]
        header = self.format.metadata(self.grids, plain, {n: source[n].dtype for n in self.grids})
        self.writer = CheckpointWriter(folder, plan, header, shard_bytes)
        self.weight_bytes = _stored_bytes(self.grids, self.format)

    def take(self, name: str, weight: torch.Tensor, first_row: int) -> None:
        """Round and write some rows of a weight; its scales and zeros follow when the last of its rows is there."""
        (rows, _), grid = self.grids[name]
        # At eight bits a row the nearest is good enough, and not every rounding knows such a grid.
        block = (nearest if name in self.tables else self.round)(weight, grid)
        for part, tensor in self.format.rows(name, block).items():
            self.writer.write(part, tensor, first_row // self.format.together(grid))
        with self._lock:
            blocks = self._scales.setdefault(name, {})
            blocks[first_row] = (block.scale, block.zero)
            if sum(len(scale) for scale, _ in blocks.values()) < rows:
                return
            del self._scales[name]
        ordered = [blocks[first] for first in sorted(blocks)]
        scale = torch.cat([scale for scale, _ in ordered])
        zero = None if grid.zero == "none" else torch.cat([zero for _, zero in ordered])
        for part, tensor in self.format.rest(name, scale, zero, grid).items():
            self.writer.write(part, tensor)

    def describe(self, source: Tensors) -> VariantFiles:
        asked = self.spec.group_size
        layers = self.grids.keys() - self.tables
        other = {n: self.grids[n][1].group_size for n in sorted(layers) if asked}
        other = {n: size for n, size in other.items() if size != asked}
        before = sum(source[name].nbytes for name in self.grids)
        unpadded = _stored_bytes(self.grids, format_of(self.spec.model_copy(update={"packing": None})))
        return VariantFiles(self.weight_bytes, before, self.weight_bytes - unpadded, other, tuple(self.kept))


def _stored_bytes(grids: Mapping[str, tuple[tuple, Grid]], form: ModuleType) -> int:
    parts = (part for name, (shape, grid) in grids.items() for part in form.plan(name, shape, grid).values())
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts)


def unfit(spec: VariantSpec, linear: Shapes) -> str | None:
    """Why a variant cannot be made of these weights, or None where it can."""
    try:
        _grids(spec, linear)
    except QuantizationError as error:
        return str(error)
    return None


def _grids(spec: VariantSpec, linear: Shapes) -> tuple[dict[str, tuple[tuple, Grid]], list[str]]:
    """The grid of every layer that is to be quantized, and the layers that were asked to stay as they are."""
    names = [n.removesuffix(".weight") for n in linear]
    for pattern in spec.keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            like = next((f"; did you mean '*{pattern}'?" for name in names if name.endswith(pattern)), "")
            raise QuantizationError(f"'keep' names {pattern!r}, which no layer to be quantized matches{like}")
    kept = sorted(n for n in linear if any(fnmatch.fnmatchcase(n.removesuffix(".weight"), p) for p in spec.keep))
    grids = {}
    for name in (n for n in linear if n not in kept):
        try:
            grids[name] = (linear[name], format_of(spec).grid(spec, linear[name][1]))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
    return grids, kept


class Variants:
    """What is made of a model in one pass, and where.

    Args:
        specs: what to make; defaults filled in (`VariantSpec.resolved`).
        output: variant name -> folder to write into.
        linear: weights to quantize, name -> (N, K), as `models.linear_weights` finds them.
        tables: the embedding and the output head, as `models.table_weights` finds them, for
            variants with `embeddings: int8`.
    """

    def __init__(
        self,
        specs: Sequence[VariantSpec] = (),
        output: Mapping[str, Path] | None = None,
        linear: Shapes | None = None,
        tables: Shapes | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.specs, self._output, self._shard_bytes = specs, output or {}, shard_bytes
        self._linear, self._tables = linear or {}, tables or {}
        self._tensors: Tensors = {}
        self._variants: list[_Variant] = []

    @contextmanager
    def writing(self, tensors: Tensors) -> Iterator[Take]:
        """Open every variant's files, for what the yielded function takes; they are whole when this is left.

        Raises:
            QuantizationError: for a weight that the model lacks, that no group size divides, or,
                in the pass, whose values are not finite. Nothing is left out silently.
        """
        self._tensors, self._variants = tensors, []
        if self.specs:
            _check(tensors, {**self._linear, **self._tables})
            _check_tables(tensors, self._linear, self._tables)
        with ExitStack() as stack:
            for spec in self.specs:
                folder = Path(self._output[spec.name])
                variant = _Variant(spec, folder, tensors, self._linear, self._tables, self._shard_bytes)
                stack.enter_context(variant.writer)
                self._variants.append(variant)
            yield self._take

    def together(self, name: str) -> int:
        """Rows of a tensor that must come together, or in multiples, since some format stores them in one."""
        return max((v.format.together(v.grids[name][1]) for v in self._variants if name in v.grids), default=1)

    def _take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Bring rows of one tensor to every variant: rounded where its grid is known, else as they are."""
        rounding_variants = [v for v in self._variants if name in v.grids]
        if rounding_variants and not are_finite(rows):
            raise QuantizationError(f"{name}: has values that are not finite; the model is broken")
        for variant in self._variants:
            if name not in variant.grids:
                variant.writer.write(name, rows, first)
        if rounding_variants:
            for start, end in tiles(*rows.shape, self.together(name)):
                for variant in rounding_variants:
                    variant.take(name, rows[start:end], first + start)

    def make_of(
        self,
        source: Path,
        on_progress: Callable[[int, int], None] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, VariantFiles]:
        """Make them of a full-precision model.

        Args:
            on_progress: called with bytes done and bytes in all.
            checkpoint: its tensors, where they do not lie in `source` beside the rest.
        """
        checkpoint = Checkpoint(source) if checkpoint is None else checkpoint
        with self.writing(checkpoint) as take:
            names = in_disk_order(checkpoint)
            jobs = chain.from_iterable(blocks_of(checkpoint, name, take, self.together(name)) for name in names)
            in_parallel(jobs, checkpoint.nbytes, on_progress, on_end=checkpoint.abandon)
        return self.finish(source)

    def finish(self, model: Path) -> dict[str, VariantFiles]:
        """Put beside the weights what comes from the full-precision model's folder: configuration, tokenizer, terms."""
        config = read_config(model)
        for variant in self._variants:
            copy_companions(model, variant.folder)
            kept, rows = ([name.removesuffix(".weight") for name in names] for names in (variant.kept, variant.tables))
            content = {**config, "quantization_config": variant.format.quantization_config(variant.spec, kept, rows)}
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
            (variant.folder / "config.json").write_text(text + "\n", encoding="utf-8")
        return {variant.spec.name: variant.describe(self._tensors) for variant in self._variants}


def quantize_checkpoint(
    source: str | Path,
    specs: Sequence[VariantSpec],
    output: Mapping[str, Path],
    linear: Shapes,
    on_progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    tables: Shapes | None = None,
) -> dict[str, VariantFiles]:
    """Write every variant of a full-precision checkpoint in one pass: `Variants.make_of` in one call."""
    return Variants(specs, output, linear, tables, shard_bytes).make_of(Path(source), on_progress)


def _check(tensors: Tensors, weights: Shapes) -> None:
    for name, shape in weights.items():
        if name not in tensors or tensors[name].shape != tuple(shape):
            found = tensors[name].shape if name in tensors else "nothing"
            raise QuantizationError(f"{name}: the model has a weight of {tuple(shape)}, the checkpoint {found}")
        if tensors[name].dtype not in ROUNDED_TYPES:
            found = str(tensors[name].dtype).removeprefix("torch.")
            raise QuantizationError(f"{name}: stored as {found}; start from a full-precision model")


def _check_tables(tensors: Tensors, linear: Shapes, tables: Shapes) -> None:
    """A tied table that is stored twice would be int8 in one of its places and not in the other."""
    again = [n for n in tensors if n not in linear and n not in tables and tensors[n].shape in tables.values()]
    if again:
        raise QuantizationError(f"{again[0]}: of the embedding's shape, and would stay as it is; use embeddings: keep")
