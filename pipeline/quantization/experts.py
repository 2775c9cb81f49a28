"""Mixtures of experts: the variants that can be made of them, and whether a variant quantizes experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.config.catalog import Need
from pipeline.config.quantize import VariantSpec, matches
from pipeline.errors import ModelError
from pipeline.models.experts import is_expert
from pipeline.quantization.fit import of_as_many_bits
from pipeline.quantization.formats import format_of


def check_experts(spec: VariantSpec, names: Iterable[str]) -> None:
    """Raise if a model is a mixture of experts and a variant cannot be made of it.

    Args:
        names: of the weights to quantize.

    Raises:
        ModelError: with the variants of as many bits that can.
    """
    experts = [name for name in names if is_expert(name)]
    if not experts:
        return
    if reason := format_of(spec).refuses_experts(spec, experts):
        others = of_as_many_bits(spec)
        can = [other.name for other in others if not format_of(other).refuses_experts(other, experts)]
        raise ModelError(f"{spec.name}: {reason}. Try: {', '.join(can)}")
    if spec.need(False) != Need.NOTHING:
        raise ModelError(
            f"{spec.name}: {spec.needing} needs the inputs of every expert, which are not collected. "
            "Try: quantize.quality=fast"
        )


def layers_of(spec: VariantSpec, linear: Mapping[str, tuple[int, int]]) -> tuple[set[tuple[int, int]], bool]:
    """Return the shapes (N, K) of the layers that a variant quantizes, and True if experts are among them.

    Args:
        linear: shapes of all weights that can be quantized.
    """
    quantized = [name for name in linear if not matches(spec.keep, name)]
    return {linear[name] for name in quantized}, any(map(is_expert, quantized))
