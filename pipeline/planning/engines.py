"""Where the variants of a configuration will run, with the layers of its model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.engines import ENGINES, misfits, tell
from pipeline.config.schema import Config
from pipeline.planning.model import Sizes
from pipeline.quantization.experts import layers_of
from pipeline.quantization.fit import misfit


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
    """Return the places by variant; none for a variant that cannot be made of this model."""
    found: dict[str, list[Place]] = {}
    for spec in config.quantize.variants:
        ways, layers = spec.variant.ways(spec.packing), layers_of(spec, sizes.linear)
        told = ((row.label.strip("`"), *words) for name, row in ENGINES.items() for words in tell(ways, name, *layers))
        found[spec.name] = [] if misfit(spec, sizes.linear) else [Place(*each) for each in told]
    return found


def tell_places(config: Config, sizes: Sizes) -> Iterator[str]:
    """Yield lines for people: where each variant runs, and where the layers of this model keep it from running."""
    lines = list(tell_misfits(config, sizes))
    for variant, opened in places(config, sizes).items():
        good = [f"{place.engine} on {place.hardware}" for place in opened if place.misfit is None]
        if opened:
            yield f"{variant} runs in: {'; '.join(good) or 'none of the known engines'}"
        yield from (line for line in lines if line.startswith(f"{variant} "))


def tell_misfits(config: Config, sizes: Sizes) -> Iterator[str]:
    """Yield lines for people: where the layers of this model keep a variant from running, or from being made."""
    for spec in config.quantize.variants:
        if reason := misfit(spec, sizes.linear):
            yield f"{spec.name} cannot be made: {reason}"
            continue
        lines = misfits(spec.variant.ways(spec.packing), *layers_of(spec, sizes.linear))
        yield from (f"{spec.name} {line}" for line in lines)
