"""What is known of a model before its first tensor comes, and which of its weights a variant quantizes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from pipeline.config.catalog import EIGHT_BITS, KEEP
from pipeline.config.schema import VariantSpec
from pipeline.errors import MissingExtra, ModelError, QuantizationError
from pipeline.models.checkpoint import SHARD_BYTES, TensorInfo
from pipeline.quantization.formats import format_of
from pipeline.quantization.grid import Grid
from pipeline.quantization.statistics import Collected

Tensors = Mapping[str, TensorInfo]  # the full-precision model, by dtypes and shapes
Shapes = Mapping[str, tuple[int, int]]  # name of a weight -> (N, K)
Tell = Callable[[int, int, str], None]  # called with what is done, with what there is in all, and what this is
Grids = dict[str, tuple[tuple[int, int], Grid]]  # name of a weight -> its shape, and the grid it is put on


@dataclass(frozen=True)
class Source:
    """A full-precision model whose tensors are about to come by.

    Attributes:
        tensors: every tensor that will come, by dtype and shape.
        folder: holds `config.json` and the tokenizer, with or without the weights.
        linear: weights to quantize, as `models.linear_weights` finds them.
        tables: the embedding and the output head, as `models.table_weights` finds them.
        template: the chat template that belongs to the model, where it is not in the folder yet.
        name: what the model is called in files that have a name of their own.
        license: of the model, where it is known.
        statistics: of the layers' inputs, by weight; empty if no rounding needs them.
    """

    tensors: Tensors
    folder: Path
    linear: Shapes
    tables: Shapes = field(default_factory=dict)
    template: str | None = None
    name: str = "model"
    license: str | None = None
    statistics: Collected = field(default_factory=dict)
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class VariantFiles:
    """What was written for one variant, and how."""

    weight_bytes: int  # stored bytes of the quantized weights
    source_bytes: int  # bytes of the same weights in the source
    padding_bytes: int  # those of them that only fill up the tiles of a packing
    group_sizes: dict[str, int]  # layers whose group size is not the one asked for
    kept: tuple[str, ...]  # layers left as they were, because that was asked for
    types: dict[str, int]  # tensors in the file of each type of GGUF; of safetensors nothing
    eight: tuple[str, ...] = ()  # layers of a variant of fewer bits that are in eight, because that was asked for


class Output(Protocol):
    """The files of one variant while they are written; a context manager that leaves them whole, or not there.

    Several threads call `take` at once, each with rows of its own.
    """

    spec: VariantSpec
    made_of: Sequence[Output] = ()  # other files that it is made of, which must be open when rows come
    is_temporary: bool = False  # True if it is only what others are made of

    def remove(self) -> None:
        """Remove a temporary file."""

    def rounds(self, name: str) -> bool:
        """Are this tensor's rows put on a grid, so that they should come in tiles that a cache holds?"""

    def together(self, name: str) -> int:
        """Rows of a tensor that must come together, or in multiples."""

    def take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Write rows of a tensor, the first of which has the number `first`."""

    def finish(self, model: Path, tell: Tell | None = None) -> None:
        """Do what comes after the pass, and put beside the weights what belongs there, from the full-precision
        model's folder.

        Args:
            tell: is told of what takes its time.
        """

    def describe(self) -> VariantFiles:
        """What was written."""

    def __enter__(self) -> Output: ...

    def __exit__(self, kind, error, trace) -> None: ...


def layer_grids(spec: VariantSpec, linear: Shapes) -> tuple[Grids, list[str]]:
    """The grid of every layer that is to be quantized, and the layers that were asked to stay as they are.

    Raises:
        QuantizationError: where `keep` or `int8` names no layer, or a layer fits no grid.
    """
    kept, eight = named(spec, KEEP, linear), named(spec, EIGHT_BITS, linear)
    grids, form = {}, format_of(spec)
    for name in (n for n in linear if n not in kept):
        try:
            grids[name] = (linear[name], form.TABLE if name in eight else form.grid(spec, linear[name][1]))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
    return grids, kept


def named(spec: VariantSpec, key: str, linear: Shapes) -> list[str]:
    """The weights that the patterns of an option name.

    Args:
        key: `keep` or `int8`.

    Raises:
        QuantizationError: where one of them names none.
    """
    names, patterns = [n.removesuffix(".weight") for n in linear], getattr(spec, key)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            like = next((f"; did you mean '*{pattern}'?" for name in names if name.endswith(pattern)), "")
            raise QuantizationError(f"'{key}' names {pattern!r}, which no layer to be quantized matches{like}")
    return sorted(f"{n}.weight" for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns))


def unfit(spec: VariantSpec, linear: Shapes, folder: Path | None = None) -> str | None:
    """Why a variant cannot be made of these weights, or None where it can.

    Args:
        folder: of the model, which not every format can store.
    """
    try:
        layer_grids(spec, linear)
        if folder is not None:
            format_of(spec).check(spec, folder)
    except (QuantizationError, ModelError, MissingExtra) as error:
        return str(error)
    return None
