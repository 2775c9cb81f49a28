"""What is tried where a variant misses its gate, and which of it is taken.

A ladder of other ways to make the variant: another rounding, smaller groups, embeddings in eight bits where that is
smaller, the most sensitive layers in eight bits. They are tried from the smallest on, in bytes, until one passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.catalog import EIGHT_BITS, GROUP_SIZES, KEEP, NEAREST
from pipeline.config.schema import VariantSpec
from pipeline.evaluation.model_result import Check, LayerLoss, ModelResult, Verdict

SHARES = (0.05, 0.1, 0.2, 0.4, 0.6)  # of the linear layers' weights, those that suffer most, in eight bits

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Rung:
    """One way to make a variant.

    Attributes:
        share: of the linear layers' weights, that are to be in eight bits; which these are is to be measured.
        bytes: of all weights, as far as is known before these layers are.
    """

    spec: VariantSpec
    share: float
    bytes: float


def ladder(asked: VariantSpec, linear: Shapes, tables: Shapes, folder: Path) -> list[Rung]:
    """The ways to make a variant, the smallest first, that asked for among them.

    Args:
        linear, tables: as `models.linear_weights` and `models.table_weights` find them.
        folder: of the full-precision model, which not every variant can be made of.
    """
    from pipeline.quantization.layers import unfit

    specs = [(spec, 0.0) for spec in _specs(asked) if not unfit(spec, linear, folder)]
    if asked.mixes and not asked.int8:
        finest = [spec for spec, _ in specs if spec.rounding == _best_rounding(asked)][-1]
        specs += [(finest, share) for share in SHARES]
    rungs = [Rung(spec, share, _bytes(spec, share, linear, tables)) for spec, share in specs]
    return sorted(rungs, key=lambda rung: rung.bytes)


def _specs(asked: VariantSpec) -> list[VariantSpec]:
    """As asked, in another rounding, in smaller groups, and these with embeddings in eight bits."""
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
    return [how for how in asked.variant.roundings if how not in (asked.rounding, NEAREST)]


def _best_rounding(asked: VariantSpec) -> str | None:
    """What smaller groups are tried with: as asked for, unless that is the plain one and there is a better."""
    others = _other_roundings(asked)
    return others[0] if asked.rounding == NEAREST and others else asked.rounding


def _changed(spec: VariantSpec, **changes: object) -> VariantSpec:
    return VariantSpec.model_validate(spec.model_dump() | changes)


def with_layers(rung: Rung, layers: Iterable[LayerLoss]) -> VariantSpec:
    """The rung's variant with its share of the weights in eight bits: where each costs most, for its size.

    Args:
        layers: as `sensitivity` has measured them.
    """
    order = sorted(layers, key=lambda layer: layer.kl.value / layer.weights, reverse=True)
    wanted, names = rung.share * sum(layer.weights for layer in order), []
    for layer in order:
        if wanted <= 0:
            break
        names.append(layer.name)
        wanted -= layer.weights
    return _changed(rung.spec, int8=sorted(names))


def distance(verdict: Verdict) -> float:
    """How far a variant is from passing: the worst of its figures, error included, as a multiple of its limit."""
    return max((_upper(check) / check.limit for check in verdict.checks), default=math.inf)


def _upper(check: Check) -> float:
    return check.value + check.quantile * check.stderr


def best(tried: Sequence[ModelResult]) -> ModelResult:
    """Of rungs none of which passed, the one that came nearest."""
    return min(tried, key=lambda rung: distance(rung.gate))


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
