"""The fallbacks of a variant that misses its gate.

A fallback makes the variant with another rounding, smaller groups, embeddings in eight bits or the most sensitive
layers in eight bits. Fallbacks are tried in the order of their bytes until one passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.catalog import EIGHT_BITS, GROUP_SIZES, KEEP, NEAREST
from pipeline.config.schema import VariantSpec
from pipeline.evaluation.model_result import LayerLoss, ModelResult, Verdict

SHARES = (0.05, 0.1, 0.2, 0.4, 0.6)  # of the weights of linear layers, to store in eight bits

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Fallback:
    """One way to make a variant.

    Attributes:
        spec: its settings, without the layers in eight bits.
        share: share of the weights of linear layers to store in eight bits; `with_layers` chooses the layers.
        bytes: expected bytes of all weights.
    """

    spec: VariantSpec
    share: float
    bytes: float


def fallbacks(asked: VariantSpec, linear: Shapes, tables: Shapes, folder: Path) -> list[Fallback]:
    """Return the ways to make a variant, the smallest first; the requested one is among them.

    Args:
        asked: the requested variant.
        linear: shapes of the linear layers, as `models.matrices.linear_weights` returns them.
        tables: shapes of the embeddings and the output head, as `models.matrices.table_weights` returns them.
        folder: folder of the full-precision model.
    """
    from pipeline.quantization.layers import unfit

    specs = [(spec, 0.0) for spec in _specs(asked) if not unfit(spec, linear, folder)]
    if asked.mixes and not asked.int8:
        finest = [spec for spec, _ in specs if spec.rounding == _best_rounding(asked)][-1]
        specs += [(finest, share) for share in SHARES]
    found = [Fallback(spec, share, _bytes(spec, share, linear, tables)) for spec, share in specs]
    return sorted(found, key=lambda fallback: fallback.bytes)


def _specs(asked: VariantSpec) -> list[VariantSpec]:
    """Return the variant as requested, in other roundings, in smaller groups, and with embeddings in eight bits."""
    variant = asked.variant
    others, best = _other_roundings(asked), _best_rounding(asked)
    found = [asked, *(_changed(asked, rounding=how) for how in others)]
    if len(variant.group_sizes) > 1:
        widest = asked.group_size or 2 * max(GROUP_SIZES)
        sizes = sorted((size for size in variant.group_sizes if size < widest), reverse=True)
        found += [_changed(asked, rounding=best, group_size=size) for size in sizes]
        found += [_changed(asked, rounding=how, group_size=sizes[-1]) for how in others if sizes and how != best]
    if asked.embeddings == KEEP and not variant.is_one_file:
        found.append(_changed(found[-1], rounding=best, embeddings=EIGHT_BITS))
    return found


def _other_roundings(asked: VariantSpec) -> list[str]:
    return [how for how in asked.variant.data_free if how not in (asked.rounding, NEAREST)]


def _best_rounding(asked: VariantSpec) -> str | None:
    """Return the rounding for smaller groups: the requested one, or a better one than rounding to nearest."""
    others = _other_roundings(asked)
    return others[0] if asked.rounding == NEAREST and others else asked.rounding


def _changed(spec: VariantSpec, **changes: object) -> VariantSpec:
    return VariantSpec.model_validate(spec.model_dump() | changes)


def with_layers(fallback: Fallback, layers: Iterable[LayerLoss]) -> VariantSpec:
    """Return the variant of a fallback with its share of weights in eight bits, where they lose most for their size.

    Args:
        fallback: the fallback.
        layers: the measured loss of each layer.
    """
    order = sorted(layers, key=lambda layer: layer.kl.value / layer.weights, reverse=True)
    wanted, names = fallback.share * sum(layer.weights for layer in order), []
    for layer in order:
        if wanted <= 0:
            break
        names.append(layer.name)
        wanted -= layer.weights
    return _changed(fallback.spec, int8=sorted(names))


def distance(verdict: Verdict) -> float:
    """Return the largest of a variant's figures, error included, as a multiple of its limit."""
    uppers = ((check.value + check.quantile * check.stderr) / check.limit for check in verdict.checks)
    return max(uppers, default=math.inf)


def best(tried: Sequence[ModelResult]) -> ModelResult:
    """Return the fallback that came nearest to its limits, if none passed."""
    return min(tried, key=lambda fallback: distance(fallback.gate or Verdict()))


def _bytes(spec: VariantSpec, share: float, linear: Shapes, tables: Shapes) -> float:
    """Return the bytes of linear layers and tables; other tensors take the same in all variants of a model."""
    from pipeline.quantization.formats import matches, sizes, stored_bytes

    tensors = {name: (tuple(shape), 2) for name, shape in {**linear, **tables}.items()}
    stored = stored_bytes(spec, tensors, linear, tables)
    if not share:
        return stored
    layers = [shape for name, shape in linear.items() if not matches(spec.keep, name)]
    by = sizes(spec)
    return stored + share * sum(by.table_bytes(spec, shape) - by.layer_bytes(spec, shape) for shape in layers)
