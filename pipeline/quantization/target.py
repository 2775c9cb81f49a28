"""The settings of a variant that reach its target, for one model. Only headers of the model's files are read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.config.catalog import EIGHT_BITS, KEEP
from pipeline.config.schema import VariantSpec
from pipeline.errors import ConfigError, ModelError, QuantizationError
from pipeline.models.checkpoint import TensorInfo
from pipeline.models.matrices import quantizable_weights, table_weights
from pipeline.models.tensor_names import open_checkpoint
from pipeline.quantization.allocation import (
    KEPT,
    Allocation,
    best_within,
    bounds,
    groups_of,
    settings,
    smallest_within,
)
from pipeline.quantization.calibration.sensitivities import Sensitivities
from pipeline.quantization.formats import format_of
from pipeline.quantization.layers import Source
from pipeline.quantization.safetensors_output import SafetensorsFolder

MARGIN = 0.9  # of a limit, for the errors of the measurement and of the estimate
MB = 1_000_000


class Choice:
    """The choice of settings for one variant of a model.

    Args:
        spec: the variant, with its target.
        limits: of its gate, by figure.
        full: folder of the full-precision model.
        losses: of its layers; None if only sizes matter.
        in_bf16: the model will be stored in bf16, whatever its type is now.

    Attributes:
        linear: shapes of the linear weights.
        tables: the embedding and the output head, if they can be quantized.
    """

    def __init__(
        self,
        spec: VariantSpec,
        limits: Mapping[str, float],
        full: Path,
        losses: Sensitivities | None = None,
        in_bf16: bool = False,
    ):
        self.spec, self._limits = spec, limits
        self.linear, tensors = quantizable_weights(full), dict(open_checkpoint(full).items())
        if in_bf16:
            tensors = {name: TensorInfo(torch.bfloat16, info.shape) for name, info in tensors.items()}
        self._source = Source(tensors, full, self.linear, table_weights(full))
        self.tables = self._source.tables if self._can_quantize_tables() else {}
        fused = losses.fused if losses else []
        rest = self.linear.keys() - {name for names in fused for name in names}
        self._groups = groups_of(
            spec if self.tables else spec.model_copy(update={"embeddings": KEEP}),
            [*fused, *([name] for name in self.linear if name in rest)],
            self.linear,
            self._source.tables,
            {name: info.dtype.itemsize for name, info in tensors.items()},
            losses.loss if losses else lambda *_: 0.0,
            rest if losses else (),  # the text never reached them, so nobody knows what they lose
        )

    def _can_quantize_tables(self) -> bool:
        if self.spec.embeddings:
            return self.spec.quantizes_embeddings
        eight = self.spec.model_copy(update={"embeddings": EIGHT_BITS, KEEP: ["*"], EIGHT_BITS: []})
        try:
            format_of(eight).check(eight, self._source.folder)
            self.bytes(eight)
        except (ModelError, QuantizationError):
            return False
        return True

    def bytes(self, spec: VariantSpec) -> int:
        """Return the bytes of the files of weights with these settings, headers included."""
        output = format_of(spec).output(spec, Path(), self._source, ())
        assert isinstance(output, SafetensorsFolder), "formats that mix are of safetensors"
        return output.planned_bytes()

    def first(self) -> tuple[VariantSpec, Allocation]:
        """Return the settings for the target, and the allocation that they come from.

        Raises:
            ConfigError: with the nearest size, if the target cannot be reached.
        """
        target = self.spec.target
        assert target, "asked for variants with a target only"
        if target.rise:
            return self.within(MARGIN * min(math.log1p(target.rise), self._limits.get("kl", math.inf)))
        self.check_reachable()
        if target.bits:
            made = best_within(self._groups, self._budget(target.bits))
            assert made, "checked above"
            return self._with(made), made
        small, least = self._smallest()
        most = int((target.size_mb or 0) * MB)
        rest = self.bytes(small) - least.bytes
        while made := best_within(self._groups, most - rest):
            spec = self._with(made)
            if (over := self.bytes(spec) - most) <= 0:
                return spec, made
            rest += over  # headers differ a little
        return small, least

    def within(self, most_loss: float) -> tuple[VariantSpec, Allocation]:
        """Return the smallest settings with at most this expected loss, or else those with the least loss."""
        made = smallest_within(self._groups, most_loss) or best_within(self._groups, bounds(self._groups)[1])
        assert made, "the largest allocation is within its own bytes"
        return self._with(made), made

    def check_reachable(self) -> None:
        """Raise ConfigError with the nearest size, if the target is smaller than the smallest variant."""
        target = self.spec.target
        assert target, "asked for variants with a target only"
        small, least = self._smallest()
        size = self.bytes(small)
        if target.size_mb and target.size_mb * MB < size:
            nearest = math.ceil(size / MB * 100) / 100
            self._refuse("size_mb", target.size_mb, f"{nearest:g} MB", nearest)
        if target.bits and self._budget(target.bits) < least.bytes:
            nearest = math.ceil(8 * least.bytes / self._weights() * 1000) / 1000
            self._refuse("bits", target.bits, f"{nearest:g} bits a weight", nearest)

    def _refuse(self, key: str, asked: float, told: str, nearest: float) -> None:
        raise ConfigError(
            f"quantize.variants {self.spec.name}: target {key} {asked:g} cannot be reached; the nearest is {told}. "
            f"Try: target: {{{key}: {nearest:g}}}"
        )

    def described(self, spec: VariantSpec, made: Allocation) -> str:
        """Return one line about settings, with their size and the expected loss."""
        counts = Counter({f"groups of {spec.group_size}": 0})
        for group, option in zip(self._groups, made.chosen, strict=True):
            if not set(group.names) & self._source.tables.keys():
                size = option.group_size
                kind = f"groups of {size}" if size else "bf16" if option.bits == KEPT else f"{option.bits} bits"
                counts[kind] += len(group.names)
        told = (f"{count} layer{'s' * (count > 1)} in {kind}" for kind, count in sorted(counts.items()) if count)
        layers = ", ".join(told)
        size, target = self.bytes(spec), self.spec.target
        bits = 8 * made.bytes / self._weights()
        line = f"{layers}, embeddings {spec.embeddings}: {size / MB:.2f} MB, {bits:.2f} bits a weight"
        line = f"{line}, expected KL divergence {made.loss:.2g}"
        is_off = target and (size < 0.99 * (target.size_mb or 0) * MB or bits < 0.99 * (target.bits or 0))
        return f"{line}; that is the nearest to the target" if is_off else line

    def _smallest(self) -> tuple[VariantSpec, Allocation]:
        made = best_within(self._groups, bounds(self._groups)[0])
        assert made, "the smallest allocation is within its own bytes"
        return self._with(made), made

    def _with(self, made: Allocation) -> VariantSpec:
        return settings(self.spec, self._groups, made, self._source.tables)

    def _weights(self) -> int:
        shapes = (*self._source.linear.values(), *self._source.tables.values())
        return sum(rows * width for rows, width in shapes)

    def _budget(self, bits: float) -> int:
        """Return the bytes of all weights with so many bits on average."""
        return int(bits * self._weights() / 8)
