"""The check of the figures: a figure that follows from other figures or from the files must agree with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluation.gates import judge, limits
from pipeline.evaluation.model_result import TEXTS
from pipeline.evaluation.results import BASE, MERGED
from pipeline.hub.tree import LINEAGE
from pipeline.publishing.lineage import own_version
from pipeline.verification.findings import Finding, right, wrong
from pipeline.verification.lineage_claims import ADAPTER, Claims
from pipeline.verification.location import Place

CLOSE = 1e-4  # of a perplexity; single losses are kept in float32


def check_figures(claims: Claims, place: Place) -> Iterator[Finding]:
    """Yield a finding for each contradiction in the lineage, or one if there is none."""
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
    """Yield each entry of the lineage that differs from its copy in the configuration or results."""
    results = claims.results
    there = {
        "run": claims.config.name,
        "base": results.origin.to_json(),
        ADAPTER: results.adapter and results.adapter.to_json(),
        "merged_into": results.merge and results.merge.base,
    }
    for key, value in there.items():
        if told.get(key) != value:
            yield f"{key!r} differs from its configuration or results"


def _size(claims: Claims, model: str) -> Iterator[str]:
    said, files = claims.results[model].size_bytes, claims.files_of(model).items()
    weights = [file.size for path, file in files if path.endswith((".safetensors", ".gguf"))]
    if said is not None and said != sum(weights):
        yield f"size_bytes is {said}; its files have {sum(weights)}"


def _rises(claims: Claims, model: str) -> Iterator[str]:
    """Yield each rise of perplexity that is not the quotient of the two perplexities."""
    reference = claims.results[MERGED if claims.config.merges else BASE]
    for text, quality in claims.results[model].quality.items():
        said, now, before = quality.rise, quality.perplexity, reference.on(text).perplexity
        if said and now and before and not math.isclose(1 + said.value, now.value / before.value, rel_tol=CLOSE):
            rise = now.value / before.value - 1
            about = f"the rise on {TEXTS.get(text, text)} text"
            yield f"{about} is {said.value:.5g}; by its perplexities it is {rise:.5g}"


def _verdict(claims: Claims, variant: str) -> Iterator[str]:
    """Yield a verdict that does not follow from the configuration's limits and the figures."""
    result = claims.results[variant]
    if result.gate is None or claims.made_with.get("tunepress") != own_version():
        return
    if any(found.freedom is None for found in result.quality.values()):
        return  # measured and judged by the rules of an earlier version
    allowed = limits(claims.config.quantize, variant)
    if result.gate.limits != allowed:
        yield f"was judged by the limits {result.gate.limits}; its configuration has {allowed}"
    elif result.gate.passed != judge(result.quality, allowed, result.gate.corrected_for or 1).passed:
        yield f"{'passes' if result.gate.passed else 'misses'} its gate, which does not follow from its figures"
