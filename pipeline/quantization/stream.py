"""One pass over a model's tensors, many variants out.

Every weight comes by once, in blocks of rows; each block is rounded for every variant
that was asked for and goes to its place in that variant's files. All cores work on
blocks of their own (`pipeline.blocks`), and the bytes do not depend on who was first.
The tensors are a checkpoint's, or come out of a merge (`pipeline.merging`).

Here is only who gets which rows. What becomes of them is the business of each variant's
output: a folder of safetensors, or a GGUF file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import torch

from pipeline.blocks import Take, are_finite, blocks_of, in_disk_order, in_parallel, tiles
from pipeline.catalog import VARIANTS
from pipeline.checkpoint import SHARD_BYTES, Checkpoint
from pipeline.config import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.quantization.folder import SafetensorsFolder
from pipeline.quantization.formats.gguf.kquants import KQuantsFile
from pipeline.quantization.formats.gguf.output import GgufFile
from pipeline.quantization.source import Output, Shapes, Source, Tell, Tensors, VariantFiles, unfit

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
    ):
        self.specs, self._output, self._shard_bytes = specs, output or {}, shard_bytes
        self._name, self._license, self._tell = name, license, tell
        self._linear, self._tables = linear or {}, tables or {}
        self._variants: list[Output] = []

    @contextmanager
    def writing(self, tensors: Tensors, folder: Path, template: str | None = None) -> Iterator[Take]:
        """Open every variant's files, for what the yielded function takes; they are whole when this is left.

        Args:
            folder: holds the model's configuration and tokenizer.
            template: the model's chat template, where it is not among them yet.

        Raises:
            QuantizationError: for a weight that the model lacks, that no group size divides, or,
                in the pass, whose values are not finite. Nothing is left out silently.
        """
        self._variants = []
        if self.specs:
            _check(tensors, {**self._linear, **self._tables})
            _check_tables(tensors, self._linear, self._tables)
        source = Source(
            tensors, folder, self._linear, self._tables, template, self._name, self._license, self._shard_bytes
        )
        with ExitStack() as stack:
            for spec in self.specs:
                output = _output(spec)(spec, Path(self._output[spec.name]), source)
                self._variants.append(stack.enter_context(output))
            yield self._take

    def together(self, name: str) -> int:
        """Rows of a tensor that must come together, or in multiples, for what some format does with them."""
        return math.lcm(*(variant.together(name) for variant in self._variants))

    def _take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Bring rows of one tensor to every variant; where they are rounded, as many as a cache holds at a time."""
        rounding_variants = [v for v in self._variants if v.rounds(name)]
        if rounding_variants and not are_finite(rows):
            raise QuantizationError(f"{name}: has values that are not finite; the model is broken")
        for variant in self._variants:
            if variant not in rounding_variants:
                variant.take(name, rows, first)
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
        with self.writing(checkpoint, source) as take:
            names = in_disk_order(checkpoint)
            jobs = chain.from_iterable(blocks_of(checkpoint, name, take, self.together(name)) for name in names)
            in_parallel(jobs, checkpoint.nbytes, on_progress, on_end=checkpoint.abandon)
        return self.finish(source)

    def finish(self, model: Path) -> dict[str, VariantFiles]:
        """Put beside the weights what comes from the full-precision model's folder: configuration, tokenizer, terms."""
        for variant in self._variants:
            variant.finish(model, self._tell)
        return {variant.spec.name: variant.describe() for variant in self._variants}


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
    """Write every variant of a full-precision checkpoint in one pass: `Variants.make_of` in one call."""
    return Variants(specs, output, linear, tables, shard_bytes, name).make_of(Path(source), on_progress)


def _output(spec: VariantSpec) -> Callable[[VariantSpec, Path, Source], Output]:
    """What writes a variant's files."""
    variant = VARIANTS[spec.name]
    if variant.format == "gguf":
        return KQuantsFile if variant.quantizer else GgufFile
    return SafetensorsFolder


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
