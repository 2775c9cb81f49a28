"""One pass over a model's tensors, many variants out.

Every weight is read once, in blocks of rows. Each block is rounded for every variant and
written to its place in the files of that variant. All cores work on blocks of their own
(`pipeline.models.checkpoint.row_blocks`), and the bytes do not depend on their order.
The tensors come from a checkpoint, or from a merge (`pipeline.training.merge`).

This module passes rows to the output of each variant: a folder of safetensors, or a GGUF file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, MissingExtra, ModelError, QuantizationError
from pipeline.models.checkpoint import SHARD_BYTES, Checkpoint
from pipeline.models.checkpoint.row_blocks import Take, are_finite, blocks_of, in_disk_order, in_parallel, tiles
from pipeline.models.tensor_names import open_checkpoint
from pipeline.quantization.equivalences import Equivalence
from pipeline.quantization.experts import check_experts
from pipeline.quantization.formats import format_of
from pipeline.quantization.layers import Output, RoundedWeights, Shapes, Source, Tell, Tensors, VariantFiles, unfit
from pipeline.quantization.statistics import Collected, check_collected

__all__ = ["VariantFiles", "Variants", "quantize_checkpoint", "unfit"]

ROUNDED_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Variants:
    """The variants that one pass makes of a model.

    Args:
        specs: the variants, with defaults filled in (`VariantSpec.resolved`).
        output: variant name -> folder to write into.
        linear: weights to quantize, name -> (N, K), as `models.matrices.quantizable_weights` finds them.
        tables: the embedding and the output head, as `models.matrices.table_weights` finds them, for
            variants with `embeddings: int8`.
        name: the name of the model in names of files.
        license: of the model, if it is known.
        tell: is called with the progress of slow steps after the pass.
        statistics: of the layers' inputs, by weight, for roundings that use them.
        rounded: weights that a calibration has rounded, by variant.
        equivalences: variant name -> the change of the weights before they are rounded.
    """

    def __init__(
        self,
        specs: Sequence[VariantSpec] = (),
        output: Mapping[str, Path] | None = None,
        linear: Shapes | None = None,
        tables: Shapes | None = None,
        shard_bytes: int = SHARD_BYTES,
        name: str = "model",
        license: str | None = None,
        tell: Tell | None = None,
        statistics: Collected | None = None,
        rounded: Mapping[str, RoundedWeights] | None = None,
        equivalences: Mapping[str, Equivalence] | None = None,
    ):
        self.specs, self._output, self._shard_bytes = specs, output or {}, shard_bytes
        self._name, self._license, self._tell = name, license, tell
        self._linear, self._tables = linear or {}, tables or {}
        self._statistics, self._rounded, self._equivalences = statistics or {}, rounded or {}, equivalences or {}
        self.failed: dict[str, Exception] = {}  # why a variant could not be made, by its name
        self._outputs: dict[Output, list[str]] = {}  # what is written, and the variants that need it

    @contextmanager
    def writing(self, tensors: Tensors, folder: Path) -> Iterator[Take]:
        """Open the files of every variant, and yield the function that takes rows. On exit the files are whole.

        Args:
            folder: holds the model's configuration and tokenizer.

        An error of one variant goes to `failed` and leaves none of its files; the others go on.

        Raises:
            QuantizationError: if the model lacks a weight, or values of a weight are not finite.
        """
        self.failed, self._outputs = {}, {}
        if self.specs:
            _check(tensors, {**self._linear, **self._tables})
        source = Source(
            tensors,
            folder,
            self._linear,
            self._tables,
            self._name,
            self._license,
            self._statistics,
            self._shard_bytes,
            self._rounded,
        )
        with ExitStack() as stack:
            for spec in sorted(self.specs, key=lambda spec: spec.quantizer is not None):
                with self._apart([spec.name]):
                    self._open(spec, source, stack)
            yield self._take

    def _open(self, spec: VariantSpec, source: Source, stack: ExitStack) -> None:
        """Open the files of a variant, and before them the shared files that they are made of."""
        check_experts(spec, self._linear)
        if equivalence := self._equivalences.get(spec.name):
            if missing := sorted(equivalence.names - set(source.tensors)):
                raise QuantizationError(f"{missing[0]}: to be smoothed, but the checkpoint has no such tensor")
            source = replace(source, statistics=equivalence.divide(source.statistics))
        if spec.name not in self._rounded:
            check_collected(spec, self._statistics)
        output = format_of(spec).output(spec, Path(self._output[spec.name]), source, self._outputs)
        for made_of in output.made_of:
            if made_of not in self._outputs:
                self._enter(made_of, stack)
            self._outputs[made_of].append(spec.name)
        self._enter(output, stack)
        self._outputs[output].append(spec.name)

    def _enter(self, output: Output, stack: ExitStack) -> None:
        output.__enter__()
        names = self._outputs[output] = []

        def leave(kind: Any, error: Any, trace: Any) -> None:
            if kind is None and not self._is_wanted(output):  # a failed variant must leave no file
                error = self.failed[names[0]]
                kind, trace = type(error), error.__traceback__
            with self._apart(names):
                output.__exit__(kind, error, trace)

        stack.push(leave)

    @contextmanager
    def _apart(self, names: Sequence[str]) -> Iterator[None]:
        """Record an error for these variants, and let the others go on."""
        try:
            yield
        except (QuantizationError, CheckpointError, ModelError, MissingExtra, OSError) as error:
            for name in names:
                self.failed.setdefault(name, error)

    def _is_wanted(self, output: Output) -> bool:
        return any(name not in self.failed for name in self._outputs[output])

    def together(self, name: str) -> int:
        """Return the number of rows that must come together for every output; blocks hold a multiple of it."""
        return math.lcm(*(output.together(name) for output in self._outputs))

    def _take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Pass rows of one tensor to every variant. Rows to round come in tiles that fit in a cache."""
        wanted = [output for output in self._outputs if self._is_wanted(output)]
        rounding = [output for output in wanted if output.rounds(name)]
        if rounding and not are_finite(rows):
            raise QuantizationError(f"{name}: has values that are not finite; the model is broken")
        for output in wanted:
            if output not in rounding:
                with self._apart(self._outputs[output]):
                    output.take(name, self._changed(output, name, rows, first), first)
        if rounding:
            for start, end in tiles(len(rows), rows.shape[1], self.together(name)):
                for output in rounding:
                    with self._apart(self._outputs[output]):
                        part = self._changed(output, name, rows[start:end], first + start)
                        output.take(name, part, first + start)

    def _changed(self, output: Output, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Return rows changed by the equivalence of the variant, if it has one."""
        equivalence = self._equivalences.get(output.spec.name)
        return rows if equivalence is None else equivalence.apply(name, rows, first)

    def make_of(
        self,
        source: Path,
        on_progress: Callable[[int, int], None] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, VariantFiles]:
        """Make the variants of a full-precision model.

        Args:
            on_progress: called with bytes done and bytes in all.
            checkpoint: its tensors by the names of the model; by default those in `source`.

        Raises:
            ModelError: before anything is written, if the model needs tensors that are missing.
        """
        checkpoint = open_checkpoint(source, to_copy=True) if checkpoint is None else checkpoint
        with self.writing(checkpoint, source) as take:
            names = in_disk_order(checkpoint)
            jobs = chain.from_iterable(blocks_of(checkpoint, name, take, self.together(name)) for name in names)
            needed = takewhile(lambda _: any(map(self._is_wanted, self._outputs)), jobs)
            in_parallel(needed, checkpoint.nbytes, on_progress, on_end=checkpoint.abandon)
        return self.finish(source)

    def finish(self, model: Path) -> dict[str, VariantFiles]:
        """Finish every variant with the configuration, tokenizer and license of the full-precision model.

        Returns:
            The figures of the files of every variant that did not fail.
        """
        made = {}
        try:
            for output in self._outputs:
                if not output.is_temporary and output.spec.name not in self.failed:
                    with self._apart([output.spec.name]):
                        output.finish(model, self._tell)
                        made[output.spec.name] = output.describe()
        finally:
            for output in self._outputs:
                if output.is_temporary:
                    output.remove()
        return {spec.name: made[spec.name] for spec in self.specs if spec.name in made}


def quantize_checkpoint(
    source: str | Path,
    specs: Sequence[VariantSpec],
    output: Mapping[str, Path],
    linear: Shapes,
    on_progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    tables: Shapes | None = None,
    name: str = "model",
) -> dict[str, VariantFiles]:
    """Write every variant of a full-precision checkpoint in one pass; raise if one of them fails."""
    variants = Variants(specs, output, linear, tables, shard_bytes, name)
    made = variants.make_of(Path(source), on_progress)
    for error in variants.failed.values():
        raise error
    return made


def _check(tensors: Tensors, weights: Shapes) -> None:
    for name, shape in weights.items():
        if name not in tensors or tensors[name].shape != tuple(shape):
            found = tensors[name].shape if name in tensors else "nothing"
            raise QuantizationError(f"{name}: the model has a weight of {tuple(shape)}, the checkpoint {found}")
        if tensors[name].dtype not in ROUNDED_TYPES:
            found = str(tensors[name].dtype).removeprefix("torch.")
            raise QuantizationError(f"{name}: stored as {found}; start from a full-precision model")
