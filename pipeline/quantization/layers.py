"""The model that a pass reads, and the weights of it that a variant quantizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.config.catalog import EIGHT_BITS, KEEP, ROUNDINGS, Need
from pipeline.config.quantize import VariantSpec
from pipeline.errors import MissingExtra, ModelError, QuantizationError
from pipeline.models.checkpoint import SHARD_BYTES, TensorInfo
from pipeline.quantization.experts import check_experts
from pipeline.quantization.fit import Shapes, check_patterns, misfit, named
from pipeline.quantization.formats import fitted, format_of
from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.roundings import rounding
from pipeline.quantization.statistics import Collected

Tensors = Mapping[str, TensorInfo]  # the full-precision model, by dtypes and shapes
Tell = Callable[[int, int, str], None]  # called with the units done, the units in all, and the name of the step
# name of a weight -> its shape and its grid; None if the format takes the weight directly
Grids = dict[str, tuple[tuple[int, int], Grid | None]]


class RoundedWeights(Protocol):
    """Weights of one variant that were rounded before the pass."""

    def __contains__(self, name: object) -> bool: ...

    def rows(self, name: str, grid: Grid, first: int, stop: int) -> GroupQuantized:
        """Return rows of a weight."""


@dataclass(frozen=True)
class Source:
    """A full-precision model whose tensors a pass will read.

    Attributes:
        tensors: dtype and shape of every tensor.
        folder: holds `config.json` and the tokenizer, with or without the weights.
        linear: weights to quantize, as `models.matrices.quantizable_weights` finds them.
        tables: the embedding and the output head, as `models.matrices.table_weights` finds them.
        name: the name of the model in names of files.
        license: of the model, if it is known.
        statistics: of the layers' inputs, by weight; empty without calibration.
        rounded: weights that a calibration has rounded, by variant.
    """

    tensors: Tensors
    folder: Path
    linear: Shapes
    tables: Shapes = field(default_factory=dict)
    name: str = "model"
    license: str | None = None
    statistics: Collected = field(default_factory=dict)
    shard_bytes: int = SHARD_BYTES
    rounded: Mapping[str, RoundedWeights] = field(default_factory=dict)

    def round(
        self, spec: VariantSpec, how: str, name: str, rows: torch.Tensor, first: int, grid: Grid
    ) -> GroupQuantized:
        """Return rows of a weight on a grid: those that a calibration has rounded, or else those rounded now.

        Args:
            how: the rounding, if they are rounded now.
            rows: (n, K), in the order of the checkpoint.
            first: number of the first row.

        Raises:
            QuantizationError: if the rounding needs statistics that the layer has not.
        """
        made = self.rounded.get(spec.name)
        if made is not None and name in made:
            return made.rows(name, grid, first, first + len(rows))
        of, need = self.statistics.get(name), ROUNDINGS[how].needs
        if need != Need.NOTHING and (of is None or (need == Need.GRAM_MATRIX and of.gram is None)):
            raise QuantizationError(
                f"{name}: the calibration text never reached this layer, and rounding {how} needs its inputs. "
                f"Try: keep: [{name.removesuffix('.weight')}]"
            )
        return rounding(how).round(rows, grid, of)


@dataclass(frozen=True)
class VariantFiles:
    """The figures of the files that were written for one variant."""

    weight_bytes: int  # stored bytes of the quantized weights
    source_bytes: int  # bytes of the same weights in the source
    padding_bytes: int  # stored bytes that only fill the tiles of a packing
    group_sizes: dict[str, int]  # layers with another group size than requested
    kept: tuple[str, ...]  # layers that `keep` leaves in full precision
    types: dict[str, int]  # number of tensors by type of GGUF; empty for safetensors
    eight: tuple[str, ...] = ()  # layers that `int8` stores in eight bits
    groups: dict[str, int] = field(default_factory=dict)  # number of layers by group size, if they have several
    shapes: tuple[tuple[int, int], ...] = ()  # (rows, columns) of the quantized layers, each once
    experts: int | None = None  # number of quantized matrices of experts; None if the model has none


class Output(Protocol):
    """The files of one variant during a pass, as a context manager that leaves whole files or none.

    Several threads call `take` at once, each with rows of its own.
    """

    spec: VariantSpec
    made_of: Sequence[Output] = ()  # other outputs that this one is made of; they open first
    is_temporary: bool = False  # True if only other outputs need it

    def remove(self) -> None:
        """Remove a temporary file."""
        return None

    def rounds(self, name: str) -> bool:
        """Return True if the rows of a tensor are rounded, so that they come in tiles that fit in a cache."""

    def together(self, name: str) -> int:
        """Return the number of rows that must come together; blocks hold a multiple of it."""

    def take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Write rows of a tensor; `first` is the number of the first one."""

    def finish(self, model: Path, tell: Tell | None = None) -> None:
        """Finish the files after the pass, and copy configuration and tokenizer from the folder `model`.

        Args:
            tell: is called with the progress of slow steps.
        """

    def describe(self) -> VariantFiles:
        """Return the figures of the written files."""

    def __enter__(self) -> Output: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


def layer_grids(spec: VariantSpec, linear: Shapes) -> tuple[Grids, list[str]]:
    """Return the grid of every layer to quantize, and the layers that `keep` leaves in full precision.

    Raises:
        QuantizationError: if a pattern of the variant matches no layer, a layer fits no grid, or `keep` leaves no
            layer, or splits layers that the engines of the variant compute as one.
    """
    check_patterns(spec, linear)
    if reason := misfit(spec, linear):
        raise QuantizationError(f"{spec.name}: {reason}")
    kept, eight = named(spec, KEEP, linear), named(spec, EIGHT_BITS, linear)
    grids: Grids = {}
    form, spec = format_of(spec), fitted(spec, linear)
    for name in (n for n in linear if n not in kept):
        try:
            grid = form.TABLE if name in eight else form.grid(spec.for_layer(name), linear[name][1])
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
        grids[name] = (linear[name], grid)
    return grids, kept


def unfit(spec: VariantSpec, linear: Shapes, folder: Path | None = None) -> str | None:
    """Return the reason why a variant cannot be made of these weights, or None if it can.

    Args:
        folder: of the model; not every format can store every model.
    """
    try:
        check_experts(spec, linear)
        layer_grids(spec, linear)
        if folder is not None:
            format_of(spec).check(spec, folder)
    except (QuantizationError, ModelError, MissingExtra) as error:
        return str(error).removeprefix(f"{spec.name}: ")  # which is said before every reason
    return None
