"""A variant as a folder of safetensors, with the configuration and the tokenizer of its model."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pipeline.config.catalog import EIGHT_BITS, NEAREST
from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.models.checkpoint import CheckpointWriter
from pipeline.models.checkpoint.writer import file_bytes
from pipeline.models.checkpoint_files import copy_companions, read_config
from pipeline.models.experts import EXPERTS, ExpertPlace, expert_places, is_expert
from pipeline.models.matrices import skeleton
from pipeline.quantization.fit import named
from pipeline.quantization.formats import format_of, storage
from pipeline.quantization.formats.safetensors import Grids, SafetensorsFormat
from pipeline.quantization.grid import Grid
from pipeline.quantization.layers import Output, Source, Tell, VariantFiles, layer_grids


class SafetensorsFolder(Output):
    """One output of a pass: its grids, its open files, and what is held of unfinished weights."""

    def __init__(self, spec: VariantSpec, folder: Path, source: Source):
        self.spec, self.folder, self.source = spec, folder, source
        form = format_of(spec)
        assert isinstance(form, SafetensorsFormat), "its `output` makes this"
        self.format = form
        self.rounding = spec.rounding or NEAREST
        found, self.kept = layer_grids(spec, source.linear)
        self.grids = {name: (shape, grid) for name, (shape, grid) in found.items() if grid is not None}
        self.eight = [name for name in named(spec, EIGHT_BITS, source.linear) if name in self.grids]
        self.tables = _tables(source) if spec.quantizes_embeddings else []
        self.grids |= {name: (source.tables[name], self.format.TABLE) for name in self.tables}
        self.places = self._places()
        self.stored = self._stored()
        self._blocks: dict[str, dict[int, tuple]] = {}  # what is held of weights whose last rows are not there yet
        self._lock = threading.Lock()

    def _places(self) -> dict[str, ExpertPlace]:
        """Return the places of experts whose codes are stored in stacks."""
        if not self.format.stacks_experts or not any(map(is_expert, self.grids)):
            return {}
        found = expert_places(skeleton(self.source.folder))
        stacks = {found[name].stack for name in self.grids if name in found}
        return {name: place for name, place in found.items() if place.stack in stacks}

    def _stored(self) -> Grids:
        """Return the shapes and grids of the quantized weights, with stacks in place of their experts.

        Raises:
            QuantizationError: if experts of a stack differ in their grids.
        """
        stored: dict[str, tuple[tuple[int, ...], Grid]] = {}
        for name, (shape, grid) in self.grids.items():
            if name not in self.places:
                stored[name] = (shape, grid)
        for name, place in self.places.items():
            own = self.grids[name][1] if name in self.grids else None
            if own is None or stored.setdefault(place.stack, (place.stack_shape, own))[1] != own:
                raise QuantizationError(
                    f"{name}: is stored otherwise than other experts of its block, which one stack cannot hold. "
                    f"Try: a pattern that names all of them, such as '*{EXPERTS}*'"
                )
        return stored

    def _plan(self) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, str]]:
        """Return the stored tensors, and the metadata of the files."""
        plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for name, info in self.source.tensors.items():
            target = self.places[name].stack if name in self.places else name
            if target not in self.stored:
                plan[name] = (info.dtype, info.shape)
            elif target not in dtypes:
                plan |= self.format.plan(target, *self.stored[target])
            dtypes[target] = info.dtype
        plain = [n for n in self.source.tensors if n not in self.grids]
        of_stored = {name: dtypes[name] for name in self.stored}
        return plan, self.format.metadata(self.spec, self.stored, plain, of_stored, self.tables)

    def planned_bytes(self) -> int:
        """Return the bytes of the files that will be written, headers included."""
        return file_bytes(*self._plan(), self.source.shard_bytes)

    def __enter__(self) -> SafetensorsFolder:
        self.format.check(self.spec, self.source.folder)
        self.writer = CheckpointWriter(self.folder, *self._plan(), self.source.shard_bytes)
        self.writer.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.writer.__exit__(kind, error, trace)

    def rounds(self, name: str) -> bool:
        """Return True if the tensor is quantized."""
        return name in self.grids

    def together(self, name: str) -> int:
        """Return the number of rows that one row of stored codes holds."""
        return self.format.together(self.grids[name][1]) if name in self.grids else 1

    def take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Write rows of a tensor; `first` is the number of the first one."""
        if name in self.grids:
            self._round(name, rows, first)
        else:
            self.writer.write(name, rows, first)

    def _round(self, name: str, weight: torch.Tensor, first_row: int) -> None:
        """Round and write rows of a weight. The last rows also write what needs all of them, such as scales."""
        grid = self.grids[name][1]
        # Rounding to nearest is good enough for eight bits a row, and not every rounding can fill such a grid.
        how = NEAREST if name in self.tables or name in self.eight else self.rounding
        block = self.format.quantize(weight, grid)
        if block is None:
            block = self.source.round(self.spec, how, name, weight, first_row, grid)
        if name in self.places:
            name, first_row = self.places[name].stack, self.places[name].first_row + first_row
        shape = self.stored[name][0]
        parts = self.format.rows(name, block)
        if not self.format.by_columns:
            for part, tensor in parts.items():
                self.writer.write(part, tensor, self.format.place(first_row, shape, grid))
            parts = {}
        with self._lock:
            blocks = self._blocks.setdefault(name, {})
            blocks[first_row] = (block.scale, block.zero, parts)
            if sum(len(scale) for scale, _, _ in blocks.values()) < math.prod(shape[:-1]):
                return
            del self._blocks[name]
        scales, zeros, columns = zip(*(blocks[first] for first in sorted(blocks)), strict=True)
        zero = None if grid.zero == "none" else torch.cat(zeros)
        whole = self.format.rest(name, shape, torch.cat(scales), zero, grid)
        whole |= self.format.of_inputs(name, self.source.statistics.get(name))
        whole |= {part: torch.cat([block[part] for block in columns], dim=-1) for part in columns[0]}
        for part, tensor in whole.items():
            self.writer.write(part, tensor)

    def finish(self, model: Path, tell: Tell | None = None) -> None:
        """Put the configuration, the tokenizer and the license beside the weights."""
        copy_companions(model, self.folder)
        parts = (self.kept, self.tables, self.eight)
        kept, tables, eight = ([name.removesuffix(".weight") for name in names] for names in parts)
        quantization = self.format.quantization_config(self.spec, kept, tables, eight, self.stored, model)
        content = {**read_config(model), "quantization_config": quantization}
        if self.places:  # codes have no product for a whole stack
            content["experts_implementation"] = "eager"
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (self.folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def describe(self) -> VariantFiles:
        """Return the figures of the written files."""
        layers = self.grids.keys() - self.tables - set(self.eight)
        asked = {n: size for n in sorted(layers) if (size := self.spec.for_layer(n).group_size)}
        used = {n: self.grids[n][1].group(self.grids[n][0][1]) for n in asked}
        other = {n: size for n, size in used.items() if size != asked[n]}
        by_size = {str(size): count for size, count in sorted(Counter(used.values()).items())}
        by_size = by_size if self.spec.group_sizes else {}
        before = sum(self.source.tensors[name].nbytes for name in self.grids)
        stored = _stored_bytes(self.stored, self.format)
        plain = storage(self.spec.variant.format)
        assert isinstance(plain, SafetensorsFormat), "another packing of safetensors"
        unpadded = _stored_bytes(self.stored, plain)
        shapes = tuple(sorted({self.grids[name][0] for name in self.grids.keys() - self.tables}))
        return VariantFiles(
            weight_bytes=stored,
            source_bytes=before,
            padding_bytes=stored - unpadded,
            group_sizes=other,
            kept=tuple(self.kept),
            types={},
            eight=tuple(self.eight),
            groups=by_size,
            shapes=shapes,
            experts=sum(map(is_expert, self.grids)) or None,
        )


def _tables(source: Source) -> list[str]:
    """Return the tables to quantize.

    Raises:
        QuantizationError: if a tied table is stored twice, and only one copy would be int8.
    """
    shapes, known = set(source.tables.values()), source.linear.keys() | source.tables.keys()
    if again := [name for name, info in source.tensors.items() if name not in known and info.shape in shapes]:
        raise QuantizationError(f"{again[0]}: of the embedding's shape, and would stay as it is; use embeddings: keep")
    return sorted(source.tables)


def _stored_bytes(grids: Grids, form: SafetensorsFormat) -> int:
    parts = (part for name, (shape, grid) in grids.items() for part in form.plan(name, shape, grid).values())
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts)
