"""A variant as one GGUF file, written in blocks of rows: header first, then every row at its place."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.config.catalog import NEAREST
from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, QuantizationError
from pipeline.models.checkpoint.placing import is_covered, put
from pipeline.models.checkpoint_files import copy_terms
from pipeline.models.experts import expert_number, is_expert
from pipeline.quantization.formats.gguf.blocks import PLAIN, pack, plain
from pipeline.quantization.formats.gguf.format import FORMAT, type_of
from pipeline.quantization.formats.gguf.header import Description, describe
from pipeline.quantization.formats.gguf.names import as_stored, library, rows_together, stored_names
from pipeline.quantization.formats.gguf.sizes import row_bytes
from pipeline.quantization.grid import Grid
from pipeline.quantization.layers import Output, Source, Tell, VariantFiles, layer_grids

_KINDS = {dtype: kind for kind, dtype in PLAIN.items()} | {torch.float64: "F32"}  # of what is stored as it is
TABLES = ("token_embd.weight", "output.weight")  # the embedding, and the output head where it is stored
_ROUTER = "ffn_gate_inp"  # which llama.cpp reads in F32


@dataclass(frozen=True)
class Place:
    """The place and the type of a tensor in the file; a stack of experts has the shape (experts, rows, columns)."""

    kind: str  # F32, F16, BF16, or the name of its grid
    grid: Grid | None
    shape: tuple[int, ...]
    row_bytes: int
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor."""
        return self.row_bytes * self.rows

    @property
    def rows(self) -> int:
        """Return the number of rows; those of all experts are counted through."""
        return self.shape[0] if len(self.shape) < 3 else self.shape[0] * self.shape[1]


class GgufFile(Output):
    """One output of a pass: the file `<model>-<TYPE>.gguf`.

    The file gets its name when every byte is on the disk. After an error no part of it is left.
    """

    def __init__(self, spec: VariantSpec, folder: Path, source: Source):
        self.spec, self.source = spec, source
        self.path = folder / self.file_name(spec, source)
        self.rounding = spec.rounding or NEAREST
        self.grids, self.kept = layer_grids(spec, source.linear)
        self.about = describe(source.folder, source.name, spec.variant.file_type or "", source.license)
        of, tensors = self.about.architecture, source.tensors
        self.names = stored_names(of, self.about.layers, tensors)
        tables = [name for name, target in self.names.items() if target in TABLES]
        self.tables = set(tables) if spec.quantizes_embeddings else set()
        for name in self.tables:
            rows, width = tensors[name].shape
            self.grids[name] = ((rows, width), FORMAT.TABLE)
        planned: dict[str, Place] = {}
        for name, target in self.names.items():
            planned[target] = self._plan(name, planned.get(target))
        extra = self.about.tensors.items()
        count = sum(math.prod(tensors[name].shape) for name in self.names)
        self.about.writer.add_size_label(library().size_label(count, 0, 0, 0))
        planned |= {name: Place("F32", None, tuple(t.shape), row_bytes("F32", 1)) for name, t in extra}
        header, self.places = _lay_out(self.about, planned)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self.places}
        folder.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            put(self._file, header, 0, self.path)
            for name, tensor in extra:
                self._write(name, plain(tensor, "F32"), 0)
        except BaseException:
            self._discard()
            raise

    @staticmethod
    def file_name(spec: VariantSpec, source: Source) -> str:
        """Return the name of the file."""
        return f"{source.name}-{spec.variant.file_type}.gguf"

    def _plan(self, name: str, stack: Place | None) -> Place:
        """Return the place of a tensor.

        Args:
            stack: the place so far of the stack that an expert's matrix belongs to.
        """
        info, (_, grid) = self.source.tensors[name], self.grids.get(name, (None, None))
        if grid is not None:
            kind = type_of(grid)
        elif len(info.shape) > 1 and self.spec.variant.bits == 16 and name not in self.kept:
            kind = self.spec.variant.file_type or ""  # F16 or BF16
        else:
            kind = "F32" if len(info.shape) == 1 else _KINDS.get(info.dtype, "")
        if not kind or not 1 <= len(info.shape) <= 2:
            raise QuantizationError(f"{name}: {info.dtype} {tuple(info.shape)} is not written as GGUF")
        width = info.shape[1] if len(info.shape) == 2 else 1
        shape = info.shape
        if is_expert(name):
            shape = (max(expert_number(name) + 1, stack.shape[0] if stack else 0), *shape)
        elif _ROUTER in self.names[name]:
            kind = "F32"
        if stack and (stack.kind, stack.shape[1:]) != (kind, shape[1:]):
            raise QuantizationError(
                f"{name}: is stored as {kind}, and other experts of its block as {stack.kind}, which one stack cannot "
                "hold. Try: a pattern under 'keep' that names all of them"
            )
        return Place(kind, grid, shape, row_bytes(kind, width))

    @property
    def is_whole(self) -> bool:
        """Return True if every matrix is stored in the dtype of the source."""
        tensors = ((self.source.tensors[name], self.places[target]) for name, target in self.names.items())
        return all(
            len(info.shape) == 1 or place.kind == "F32" or _KINDS.get(info.dtype) == place.kind
            for info, place in tensors
        )

    def rounds(self, name: str) -> bool:
        """Return True if the tensor is quantized."""
        return name in self.names and self.places[self.names[name]].grid is not None

    def together(self, name: str) -> int:
        """Return the number of rows that are reordered together."""
        return rows_together(self.about.architecture, name, self.about.head_dim)

    def take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Write rows of a tensor; `first` is the number of the first one."""
        if name not in self.names:
            return
        place = self.places[self.names[name]]
        stored = functools.partial(as_stored, self.about.architecture, name, head_dim=self.about.head_dim)
        try:
            if place.grid is None:
                data = plain(stored(rows), place.kind)
            else:
                # Rounding to nearest is good enough for tables in eight bits.
                how, rows = NEAREST if name in self.tables else self.rounding, FORMAT.to_round(rows)
                data = pack(self.source.round(self.spec, how, name, rows, first, place.grid).reordered(stored))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
        before = expert_number(name) * self.source.tensors[name].shape[0] if is_expert(name) else 0
        self._write(self.names[name], data, before + first)

    def _write(self, target: str, data: torch.Tensor, first: int) -> None:
        """Write rows as bytes (n, row_bytes) to their place."""
        place = self.places[target]
        if data.shape[1] != place.row_bytes or first + len(data) > place.rows:
            raise ValueError(f"{target}: rows from {first} on, {tuple(data.shape)} bytes, do not fit {place}")
        rows = memoryview(cast(Any, data.contiguous().view(-1).numpy()))  # no `Buffer` before Python 3.12
        put(self._file, rows, place.offset + first * place.row_bytes, self.path)
        self._written[target].append((first, first + len(data)))

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._close()
        finally:
            self._discard()

    def _close(self) -> None:
        unfinished = [name for name, p in self.places.items() if not is_covered(self._written[name], p.rows)]
        if unfinished:
            raise ValueError(f"{self.path}: {len(unfinished)} tensors unfinished, first {unfinished[0]}")
        try:
            os.ftruncate(self._file, max(_padded(place.offset + place.nbytes) for place in self.places.values()))
            os.fsync(self._file)
            os.replace(self._partial, self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _discard(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._partial.unlink(missing_ok=True)
        self._file = -1

    def finish(self, model: Path, tell: Tell | None = None) -> None:
        """Put the license beside the file, which holds the configuration and the tokenizer."""
        copy_terms(model, self.path.parent)

    def describe(self) -> VariantFiles:
        """Return the figures of the written file."""
        stored = sum(self.places[target].nbytes for target in {self.names[name] for name in self.grids})
        before = sum(self.source.tensors[name].nbytes for name in self.grids)
        types = dict(Counter(place.kind for place in self.places.values()))
        return VariantFiles(stored, before, 0, {}, tuple(self.kept), types)


def _lay_out(about: Description, planned: dict[str, Place]) -> tuple[bytes, dict[str, Place]]:
    """Return the bytes of the file up to its first tensor, and the place of each tensor."""
    gguf, writer = library(), about.writer
    for name, place in planned.items():
        kind = gguf.GGMLQuantizationType[place.kind]
        writer.add_tensor_info(name, place.shape, cast(Any, None), place.nbytes, raw_dtype=kind)  # no numpy dtype
    header = io.BytesIO()
    writer.fout, writer.state = cast(Any, [header]), gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    offset, places = _padded(header.tell()), {}
    for name, place in planned.items():
        places[name] = Place(place.kind, place.grid, place.shape, place.row_bytes, offset)
        offset += _padded(place.nbytes)
    return header.getvalue(), places


def _padded(count: int) -> int:
    return count + -count % library().GGUF_DEFAULT_ALIGNMENT
