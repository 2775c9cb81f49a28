"""Do the statements of a lineage agree with each other, and with its files? Some figures follow from others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluation.gates import judge, limits
from pipeline.hub.tree import LINEAGE
from pipeline.publishing.lineage import own_version
from pipeline.verification.claims import ADAPTER, Claims
from pipeline.verification.findings import Finding, right, wrong
from pipeline.verification.places import Place

CLOSE = 1e-4  # of a perplexity; single losses are kept in float32


def check_figures(claims: Claims, place: Place) -> Iterator[Finding]:
    """A line for each statement that another one contradicts.

    Raises:
        Exception: of any kind, where the results are of a form that ours never have.
    """
    problems = [*_twice_told(claims, json.loads(place.lineage()))]
    for model in (model for model in claims.models if model != ADAPTER):
        problems += [f"{model}: {problem}" for problem in (*_size(claims, model), *_rises(claims, model))]
    for variant in claims.variants:
        problems += [f"{variant}: {problem}" for problem in _verdict(claims, variant)]
    for problem in problems:
        yield wrong("figures", LINEAGE, problem)
    if not problems:
        yield right("figures", LINEAGE, "agree with each other and with the files")


def _twice_told(claims: Claims, told: Mapping[str, Any]) -> Iterator[str]:
    """What stands in the lineage for itself, and in its configuration or results too."""
    there = {
        "run": claims.config.name,
        "base": claims.get("origin") or {},
        ADAPTER: claims.get(ADAPTER),
        "merged_into": claims.get("merge", "base"),
    }
    for key, value in there.items():
        if told.get(key) != value:
            yield f"{key!r} is not what its configuration or its results have"


def _size(claims: Claims, model: str) -> Iterator[str]:
    said = claims.get(model, "size_bytes")
    files = claims.files_of(model).items()
    weights = [file.size for path, file in files if path.endswith((".safetensors", ".gguf"))]
    if said is not None and said != sum(weights):
        yield f"size_bytes is {said}, and its files have {sum(weights)}"


def _rises(claims: Claims, model: str) -> Iterator[str]:
    """Perplexity rises by the quotient of two that stand there too."""
    for text in claims.get(model, "quality") or ():
        said = claims.get(model, "quality", text, "rise", "value")
        of = "merged" if claims.config.merges else "base"
        now, before = (claims.get(name, "quality", text, "perplexity", "value") for name in (model, of))
        if None not in (said, now, before) and not math.isclose(1 + said, now / before, rel_tol=CLOSE):
            yield f"the rise on {text} text is {said:.5g}, and its perplexities make it {now / before - 1:.5g}"


def _verdict(claims: Claims, variant: str) -> Iterator[str]:
    """Limits follow from the configuration, and with these, whether the figures pass."""
    verdict = claims.get(variant, "gate")
    if verdict is None or claims.made_with.get("tunepress") != own_version():
        return
    allowed = limits(claims.config.quantize, variant)
    if verdict["limits"] != allowed:
        yield f"was held to the limits {verdict['limits']}, and its configuration has {allowed}"
    elif verdict["passed"] != judge(claims.get(variant, "quality"), allowed)["passed"]:
        yield f"{'passes' if verdict['passed'] else 'misses'} its gate, which does not follow from its figures"
