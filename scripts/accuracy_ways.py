"""The ways to store a model that the accuracy benchmark compares, as they are written in its options.

NAME[:GROUP_SIZE[:ROUNDING[:QUALITY]]][:KEY=VALUE]...     ours: `int4:32:gptq:calibrated:embeddings=int8`
TYPE[:imatrix]                                            llama.cpp's own quantizer: `Q4_K_M:imatrix`
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

from pipeline.config.builders import read_target, variant_specs
from pipeline.config.calibration import QUALITIES
from pipeline.config.quantize import VariantSpec
from pipeline.errors import ConfigError

PEERS = (
    "Q4_0", "Q4_0:imatrix", "Q4_K_M", "Q4_K_M:imatrix", "Q5_0", "Q5_0:imatrix", "Q5_K_M", "Q5_K_M:imatrix", "Q8_0",
)  # fmt: skip
MOMENTS = "int4:32:search:calibrated:embeddings=int8"  # its calibration collects second moments and no more
ALLOCATED = 6.2  # bits a weight of variants with mixed layers: between four bits and eight
IMATRIX = "imatrix"


@dataclass(frozen=True)
class Way:
    """One of our variants.

    Attributes:
        spec: as `quantize.variants` takes it.
        quality: `quantize.quality`; None for the default.
        asked: settings that its name in tables adds to what was made, such as `target size_mb=105`.
    """

    spec: dict
    quality: str | None = None
    asked: str = ""

    @property
    def slug(self) -> str:
        """The name of its folder."""
        text = json.dumps([*self.spec.items(), self.quality or ""])
        return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Peer:
    """A file that llama.cpp's own quantizer makes, without or with an importance matrix."""

    kind: str
    has_matrix: bool = False

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"llama.cpp {self.kind}{' ' + IMATRIX if self.has_matrix else ''}"


def ladder() -> str:
    """Return variants from four bits to eight, of every quality; embeddings in eight bits, as llama.cpp has them."""
    return ",".join(
        [
            "int8:::embeddings=int8",
            *(f"int4:32::{quality}:embeddings=int8" for quality in QUALITIES),
            *(f"int4:32::{quality}:embeddings=int8:target.bits={ALLOCATED}" for quality in QUALITIES),
            MOMENTS,
            *(f"gguf-{kind}:::{quality}" for kind in ("q4_0", "q5_0") for quality in ("fast", "calibrated")),
        ]
    )


def ways(text: str) -> list[Way]:
    """Return ways of a list like `int8,int4:32:hqq`, each once.

    Raises:
        ConfigError: naming the part that is written in another way.
    """
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        given, options = _divided(part)
        size, rounding, quality, *more = [*given[1:], *[""] * 3][: max(3, len(given) - 1)]
        if more or not re.fullmatch(r"\d*", size):
            raise ConfigError(f"--variants {part}: write NAME[:GROUP_SIZE[:ROUNDING[:QUALITY]]][:KEY=VALUE]...")
        asked = " ".join(f"{key} {json.dumps(value)}" for key, value in options.items() if isinstance(value, dict))
        specs = variant_specs([given[0]], int(size) if size else None, rounding or None)
        found += [
            Way(spec | options, quality or None, re.sub(r'[{}"]', "", asked).replace(": ", "=")) for spec in specs
        ]
    unique = [way for number, way in enumerate(found) if way not in found[:number]]
    if not unique:
        raise ConfigError("--variants: names none")
    return unique


def with_target(way: Way, text: str) -> Way:
    """Return a way with a target like `rise=0.03`, if its layers can differ.

    Raises:
        ConfigError: if it is written in another way.
    """
    target = read_target(text)
    if not VariantSpec.model_validate(way.spec).mixes:
        return way
    return replace(way, spec=way.spec | {"target": target}, asked=f"target {text}")


def peers(text: str) -> list[Peer]:
    """Return peers of a list like `Q4_0,Q4_K_M:imatrix`, each once.

    Raises:
        ConfigError: naming the part that is written in another way.
    """
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        if not (given := re.fullmatch(rf"(\w+)(:{IMATRIX})?", part)):
            raise ConfigError(f"--peers {part}: write TYPE or TYPE:{IMATRIX}")
        found[Peer(given[1].upper(), bool(given[2]))] = None
    return list(found)


def _divided(part: str) -> tuple[list[str], dict]:
    """Return the values that are given by place, and the mapping of those that are given by key."""
    values, options = [], {}
    for field in part.split(":"):
        key, equals, value = field.partition("=")
        if not equals:
            if options:
                raise ConfigError(f"--variants {part}: {field} comes after a KEY=VALUE. Try: put it before")
            values.append(field)
            continue
        *sections, last = key.split(".")
        place = options
        for section in sections:
            place = place.setdefault(section, {})
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return values, options
