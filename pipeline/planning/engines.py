"""Where the variants of a configuration will run, with the layers of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.engines import ENGINES, Runs, tell
from pipeline.config.quantize import VariantSpec, matches
from pipeline.config.schema import Config
from pipeline.models.experts import is_expert
from pipeline.planning.model import Sizes


@dataclass(frozen=True)
class Place:
    """An engine, the hardware on which it opens a variant, and the reason why it does not run it there.

    Attributes:
        hardware: in words, with the packages that the engine needs: `CUDA with mslk`.
        misfit: the layers that its kernel cannot take; None if it takes all.
    """

    engine: str
    hardware: str
    misfit: str | None


def places(config: Config, sizes: Sizes) -> dict[str, list[Place]]:
    """Return the places by variant."""
    return {spec.name: list(_places(spec, sizes)) for spec in config.quantize.variants}


def _places(spec: VariantSpec, sizes: Sizes) -> Iterator[Place]:
    quantized = [name for name in sizes.linear if not matches(spec.keep, name)]
    shapes, has_experts = {sizes.linear[name] for name in quantized}, any(map(is_expert, quantized))
    ways: tuple[Runs, ...] = spec.variant.ways(spec.packing)
    for engine, row in ENGINES.items():
        yield from (Place(row.label.strip("`"), *told) for told in tell(ways, engine, shapes, has_experts))


def tell_places(found: Mapping[str, Sequence[Place]]) -> Iterator[str]:
    """Yield lines for people: where each variant runs, and where the layers of this model keep it from running."""
    for variant, opened in found.items():
        good = [f"{place.engine} on {place.hardware}" for place in opened if place.misfit is None]
        yield f"{variant} runs in: {'; '.join(good) or 'none of the known engines'}"
        yield from tell_misfits({variant: opened})


def tell_misfits(found: Mapping[str, Sequence[Place]]) -> Iterator[str]:
    """Yield lines for people: where the layers of this model keep a variant from running."""
    for variant, opened in found.items():
        for why in dict.fromkeys(place.misfit for place in opened if place.misfit):
            where = "; ".join(f"{place.engine} on {place.hardware}" for place in opened if place.misfit == why)
            yield f"{variant} does not run in: {where}, because {why}"
