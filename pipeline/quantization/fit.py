"""Checks of the layers that a variant quantizes, from their names and shapes alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from pipeline.config.catalog import EIGHT_BITS, KEEP, VARIANTS
from pipeline.config.engines import ENGINES, FUSED
from pipeline.config.quantize import VariantSpec, matches
from pipeline.errors import QuantizationError
from pipeline.quantization.formats import sizes

Shapes = Mapping[str, tuple[int, int]]  # name of a weight -> (N, K)


def check_patterns(spec: VariantSpec, linear: Shapes) -> None:
    """Raise if the patterns of a variant do not suit the weights that can be quantized.

    Raises:
        QuantizationError: if one matches no layer, or `keep` leaves none, or splits layers that an engine of the
            variant computes as one.
    """
    try:
        for patterns in spec.group_sizes.values():
            _check_matched(patterns, "group_sizes", linear)
        kept = named(spec, KEEP, linear)
        named(spec, EIGHT_BITS, linear)
        if kept and len(kept) == len(linear) and not spec.quantizes_embeddings:
            raise QuantizationError(f"'{KEEP}' leaves no layer to quantize. Try: fewer patterns under '{KEEP}'")
        _check_fused(spec, kept, linear)
    except QuantizationError as error:
        raise QuantizationError(f"{spec.name}: {error}") from None


def named(spec: VariantSpec, key: str, linear: Shapes) -> list[str]:
    """Return the weights that the patterns of an option match.

    Args:
        key: `keep` or `int8`.

    Raises:
        QuantizationError: if a pattern matches no weight.
    """
    patterns = getattr(spec, key)
    _check_matched(patterns, key, linear)
    return sorted(name for name in linear if matches(patterns, name))


def misfit(spec: VariantSpec, linear: Shapes) -> str | None:
    """Return the reason why the format of a variant cannot store some of these weights, and the way out, or None."""
    wrong = _wrong(spec, linear)
    if not wrong:
        return None
    name, reason = next(iter(wrong.items()))
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{name}: {reason}{more}. Try: {_way_out(spec, linear, wrong)}"


def _wrong(spec: VariantSpec, linear: Shapes) -> dict[str, str]:
    """Return the weights that a format cannot store, each with the reason."""
    check = getattr(sizes(spec), "misfit", None)
    if check is None:
        return {}
    left = (name for name in linear if not matches([*spec.keep, *spec.int8], name))
    found = ((name, check(spec.for_layer(name), linear[name])) for name in left)
    return {name: reason for name, reason in found if reason}


def _way_out(spec: VariantSpec, linear: Shapes, wrong: Collection[str]) -> str:
    """Return the patterns that keep these weights, and other variants if nothing would be left to quantize."""
    engine = _fusing(spec)
    kinds = {name.removesuffix(".weight").rpartition(".")[2] for name in wrong}
    for group in FUSED if engine else ():
        kinds |= set(group) if kinds.intersection(group) else set()
    found = {name.removesuffix(".weight").rpartition(".")[2]: name for name in linear}
    patterns = [*spec.keep, *(f"*.{kind}" for kind in found if kind in kinds)]
    if not all(matches(patterns, name) for name in linear):
        return f"{KEEP}: {patterns}"
    can = [other.name for other in of_as_many_bits(spec) if not _wrong(other, linear)]
    return ", ".join(can) or "a variant with more bits"


def of_as_many_bits(spec: VariantSpec) -> Iterator[VariantSpec]:
    """Return the variants with as many bits, with their default settings."""
    return (VariantSpec(name=name).resolved() for name, row in VARIANTS.items() if row.bits == spec.variant.bits)


def _fusing(spec: VariantSpec) -> str | None:
    """Return an engine that runs a variant and computes several layers as one, or None."""
    ways = (way for way in spec.variant.ways(spec.packing) if way.computes and not way.experimental)
    return next((ENGINES[way.engine].label for way in ways if ENGINES[way.engine].fuses), None)


def _check_fused(spec: VariantSpec, kept: Sequence[str], linear: Shapes) -> None:
    """Raise if `keep` splits layers that an engine of the variant computes as one."""
    engine = _fusing(spec)
    if engine is None:
        return
    for name in kept:
        block, _, layer = name.removesuffix(".weight").rpartition(".")
        for fused in (group for group in FUSED if layer in group):
            others = [f"{block}.{other}" for other in fused if f"{block}.{other}.weight" in linear.keys() - set(kept)]
            if others:
                raise QuantizationError(
                    f"'{KEEP}' names {block}.{layer}, which {engine} computes as one with {', '.join(others)}. "
                    "Try: keep all of them"
                )


def _check_matched(patterns: Sequence[str], key: str, linear: Shapes) -> None:
    for pattern in patterns:
        if not any(matches([pattern], name) for name in linear):
            layers = (name.removesuffix(".weight") for name in linear)
            like = next((f"; did you mean '*{pattern}'?" for layer in layers if layer.endswith(pattern)), "")
            raise QuantizationError(f"'{key}' names {pattern!r}, which no layer to be quantized matches{like}")
