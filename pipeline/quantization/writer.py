"""One pass over a model's tensors, many variants out.

Every weight comes by once, in blocks of rows; each block is rounded for every variant
that was asked for and goes to its place in that variant's files. All cores work on
blocks of their own (`pipeline.models.checkpoint.row_blocks`), and the bytes do not depend on who was first.
The tensors are a checkpoint's, or come out of a merge (`pipeline.training.merge`).

Here is only who gets which rows. What becomes of them is the business of each variant's
output: a folder of safetensors, or a GGUF file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, takewhile
from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, MissingExtra, ModelError, QuantizationError
from pipeline.models.checkpoint import SHARD_BYTES, Checkpoint
from pipeline.models.checkpoint.row_blocks import Take, are_finite, blocks_of, in_disk_order, in_parallel, tiles
from pipeline.quantization.equivalences import Equivalence
from pipeline.quantization.formats import format_of
from pipeline.quantization.layers import Output, Shapes, Source, Tell, Tensors, VariantFiles, unfit
from pipeline.quantization.statistics import Collected, check_collected

__all__ = ["VariantFiles", "Variants", "quantize_checkpoint", "unfit"]

ROUNDED_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Variants:
    """What is made of a model in one pass, and where.

    Args:
        specs: what to make; defaults filled in (`VariantSpec.resolved`).
        output: variant name -> folder to write into.
        linear: weights to quantize, name -> (N, K), as `models.linear_weights` finds them.
        tables: the embedding and the output head, as `models.table_weights` finds them, for
            variants with `embeddings: int8`.
        name: what the model is called in files that have a name of their own.
        license: of the model, where it is known.
        tell: is told of what takes its time after the pass: what is done, what there is in all, and what this is.
        statistics: of the layers' inputs, by weight, for roundings that need them.
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
        equivalences: Mapping[str, Equivalence] | None = None,
    ):
        self.specs, self._output, self._shard_bytes = specs, output or {}, shard_bytes
        self._name, self._license, self._tell = name, license, tell
        self._linear, self._tables = linear or {}, tables or {}
        self._statistics, self._equivalences = statistics or {}, equivalences or {}
        self.failed: dict[str, Exception] = {}  # why a variant could not be made, by its name
        self._outputs: dict[Output, list[str]] = {}  # what is written, and the variants that need it

    @contextmanager
    def writing(self, tensors: Tensors, folder: Path, template: str | None = None) -> Iterator[Take]:
        """Open every variant's files, for what the yielded function takes; they are whole when this is left.

        Args:
            folder: holds the model's configuration and tokenizer.
            template: the model's chat template, where it is not among them yet.

        What fails for one variant is told in `failed`, and nothing of it is left; the others go on.

        Raises:
            QuantizationError: for a weight that the model lacks, or, in the pass, whose values are not finite.
        """
        self.failed, self._outputs = {}, {}
        if self.specs:
            _check(tensors, {**self._linear, **self._tables})
        source = Source(
            tensors,
            folder,
            self._linear,
            self._tables,
            template,
            self._name,
            self._license,
            self._statistics,
            self._shard_bytes,
        )
        with ExitStack() as stack:
            for spec in sorted(self.specs, key=lambda spec: spec.variant.quantizer is not None):
                with self._apart([spec.name]):
                    self._open(spec, source, stack)
            yield self._take

    def _open(self, spec: VariantSpec, source: Source, stack: ExitStack) -> None:
        """Open a variant's files, and before them the files that they are made of, which variants may share."""
        check_collected([spec], self._statistics)
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

        def leave(kind, error, trace) -> None:
            if kind is None and not self._is_wanted(output):  # for what failed it is not to be finished
                error = self.failed[names[0]]
                kind, trace = type(error), error.__traceback__
            with self._apart(names):
                output.__exit__(kind, error, trace)

        stack.push(leave)

    @contextmanager
    def _apart(self, names: Sequence[str]) -> Iterator[None]:
        """What fails here fails for these variants, and keeps no other back."""
        try:
            yield
        except (QuantizationError, CheckpointError, ModelError, MissingExtra, OSError) as error:
            for name in names:
                self.failed.setdefault(name, error)

    def _is_wanted(self, output: Output) -> bool:
        return any(name not in self.failed for name in self._outputs[output])

    def together(self, name: str) -> int:
        """Rows of a tensor that must come together, or in multiples, for what some format does with them."""
        return math.lcm(*(output.together(name) for output in self._outputs))

    def _take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Bring rows of one tensor to every variant; where they are rounded, as many as a cache holds at a time."""
        wanted = [output for output in self._outputs if self._is_wanted(output)]
        rounding = [output for output in wanted if output.rounds(name)]
        if rounding and not are_finite(rows):
            raise QuantizationError(f"{name}: has values that are not finite; the model is broken")
        for output in wanted:
            if output not in rounding:
                with self._apart(self._outputs[output]):
                    output.take(name, self._changed(output, name, rows, first), first)
        if rounding:
            for start, end in tiles(*rows.shape, self.together(name)):
                for output in rounding:
                    with self._apart(self._outputs[output]):
                        part = self._changed(output, name, rows[start:end], first + start)
                        output.take(name, part, first + start)

    def _changed(self, output: Output, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Return rows as the equivalence of an output's variant has them."""
        equivalence = self._equivalences.get(output.spec.name)
        return rows if equivalence is None else equivalence.apply(name, rows, first)

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
        with self.writing(checkpoint, source) as take:
            names = in_disk_order(checkpoint)
            jobs = chain.from_iterable(blocks_of(checkpoint, name, take, self.together(name)) for name in names)
            jobs = takewhile(lambda _: any(map(self._is_wanted, self._outputs)), jobs)
            in_parallel(jobs, checkpoint.nbytes, on_progress, on_end=checkpoint.abandon)
        return self.finish(source)

    def finish(self, model: Path) -> dict[str, VariantFiles]:
        """Put beside the weights what comes from the full-precision model's folder: configuration, tokenizer, terms.

        Returns:
            What was written for every variant that did not fail.
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
    """Write every variant of a full-precision checkpoint in one pass, or raise why one of them cannot be made."""
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
