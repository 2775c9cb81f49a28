"""Presets: sets of variants by purpose. They are named wherever variants are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pipeline.config.catalog import ALIASES, EIGHT_BITS, VARIANTS, resolve_variants
from pipeline.config.engines import ENGINES, LLAMA_CPP, OLLAMA, SGLANG, TRANSFORMERS, TUNEPRESS, VLLM, Runs

# name -> a description, and the value of `quantize.variants`
PRESETS: dict[str, tuple[str, tuple[dict, ...]]] = {
    "balanced": (
        "int8, and int4 in groups of 64 with embeddings in 8 bits: about half and a third of the size",
        ({"name": "int8"}, {"name": "int4", "group_size": 64, "embeddings": EIGHT_BITS}),
    ),
    "high_quality": (
        "int8, and int4 in groups of 32 with embeddings in 8 bits: somewhat larger, and loses least",
        ({"name": "int8"}, {"name": "int4", "group_size": 32, "embeddings": EIGHT_BITS}),
    ),
    "edge": (
        "int4 in groups of 128 and embeddings in 8 bits: the smallest, for CPUs and small devices",
        ({"name": "int4", "group_size": 128, "embeddings": EIGHT_BITS},),
    ),
    "gpu_optimized": (
        "int8 and int4 stored in the order of CUDA's tensor cores, in groups of 128",
        ({"name": "int8"}, {"name": "int4", "group_size": 128, "packing": "tile_packed"}),
    ),
    "serving": (
        "w4a16, w8a8 and fp8: four bits, eight bits, and eight bits in floating point for Ada and newer",
        ({"name": "w4a16"}, {"name": "w8a8"}, {"name": "fp8"}),
    ),
    "local": (
        "GGUF in eight bits and in four",
        ({"name": "gguf-q8_0"}, {"name": "gguf-q4_k"}),
    ),
}
PRESETS["everything"] = (
    "balanced, serving and local together",
    tuple(item for name in ("balanced", "serving", "local") for item in PRESETS[name][1]),
)

# Where a model will run -> in words, and the engines that each of the variants for it runs on. Except for the first,
# the preset of the same name is proposed.
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    TRANSFORMERS: ("Python code with transformers or tunepress", (TRANSFORMERS, TUNEPRESS)),
    "serving": ("a server: vLLM or SGLang", (VLLM, SGLANG)),
    "local": ("llama.cpp, Ollama or LM Studio", (LLAMA_CPP, OLLAMA)),
    "everything": ("all of these", ()),
}


def variants_for(place: str) -> list[str]:
    """Return the variants that all engines of a place run on some hardware, in the order of the catalogue."""
    engines = set(PLACES[place][1])
    return [name for name, variant in VARIANTS.items() if engines <= _engines(variant.ways())]


def place_of(variant: str, ways: Iterable[Runs]) -> str:
    """Return the engines that a variant is made for, in words: `vLLM and SGLang`.

    Args:
        ways: the ways in which engines run it, as it is packed, with the layers of its model.
    """
    running = _engines(ways)
    for place in ("serving", "local"):
        labels = [ENGINES[engine].label.split(",")[0] for engine in PLACES[place][1] if engine in running]
        if labels and variant in variants_for(place):
            return " and ".join(labels)
    return ENGINES[TRANSFORMERS].label


def _engines(ways: Iterable[Runs]) -> set[str]:
    """Return the engines that compute in one of these ways, without the experimental ones."""
    return {way.engine for way in ways if way.computes and not way.experimental}


def expand(listed: Iterable[str]) -> list[dict]:
    """Return the variants of lists of names, each separated by commas; a name may be a preset, or an alias.

    Raises:
        KeyError: with the first name that is none of these.
    """
    found: list[dict] = []
    for name in (name.strip() for text in listed for name in text.split(",") if name.strip()):
        if (preset := name.lower().replace("-", "_")) in PRESETS:
            found += map(dict, PRESETS[preset][1])
            continue
        try:
            found += [{"name": variant} for variant in resolve_variants(name)]
        except KeyError:
            raise KeyError(name) from None
    return found


def expand_aliases(value: Any) -> Any:
    """Replace presets and aliases by their variants, and a single name by a list."""
    if isinstance(value, (str, dict)):
        value = [value]
    if not isinstance(value, list):
        return value
    expanded: list[Any] = []
    for item in value:
        name: Any = item.get("name") if isinstance(item, dict) else item
        try:
            variants = expand([name])
        except (KeyError, AttributeError):
            variants = []
        options = item if isinstance(item, dict) else {}
        # Other items are refused by the check of `VariantSpec`, which names the position.
        expanded += [variant | options | {"name": variant["name"]} for variant in variants] or [item]
    return expanded


def names_to_choose(given: object = None) -> str:
    """Return the names that `expand` takes, for messages, and the one that is most like a given other one.

    Second names of single variants are left out, so that the line stays short.
    """
    names = [*VARIANTS, *(name for name, variants in ALIASES.items() if len(variants) > 1), *PRESETS]
    known = [*VARIANTS, *ALIASES, *PRESETS]
    close = difflib.get_close_matches(given.strip().lower(), known, n=1) if isinstance(given, str) else []
    return ", ".join(names) + (f"; did you mean {close[0]!r}?" if close else "")
