"""Keys of earlier versions, read as those of this one."""

from __future__ import annotations

import functools
import sys
from typing import Any

from pydantic import ValidationError

from pipeline.config.catalog import DEFAULT_VARIANTS, KEEP
from pipeline.config.presets import expand_aliases
from pipeline.config.quantize import VariantSpec

DOCSTRINGS = "builtin:python-docs"  # calibration text of runs without data


def with_targets(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, as plain data, with targets instead of `quantize.on_gate_failure: escalate`.

    Variants that cannot mix bits are withheld if they miss their gate. Without training data, the calibration text is
    docstrings unless one is named.
    """
    section = tree.get("quantize")
    if not isinstance(section, dict) or section.get("on_gate_failure") != "escalate":
        return tree
    _tell_of_target()
    section = section | {"on_gate_failure": "withhold"}
    if tree.get("evaluate", {}) is None:  # nothing is measured
        return tree | {"quantize": section}
    gate, variants = section.get("gate") or {}, expand_aliases(section.get("variants", list(DEFAULT_VARIANTS)))
    if isinstance(variants, list) and isinstance(gate, dict):
        section["variants"] = [_with_target(item, gate.get("rise")) for item in variants]
    if tree.get("data") is None:
        section["calibration"] = {"source": DOCSTRINGS} | (section.get("calibration") or {})
    return tree | {"quantize": section}


def _with_target(item: Any, rise: object) -> Any:
    """Return a variant with its limit as its target, if its layers can differ and are not settled."""
    try:
        spec = VariantSpec.model_validate(item)
    except ValidationError:  # another check names its position
        return item
    if not spec.mixes or spec.target or spec.int8:
        return item
    given = spec.model_dump(exclude_unset=True)
    if given.get("embeddings") == KEEP:  # was only the default, and other ways were tried
        del given["embeddings"]
    return given | {"target": {"rise": spec.gate.rise or rise or spec.variant.rise}}


@functools.cache
def _tell_of_target() -> None:
    print("quantize.on_gate_failure: escalate is now quantize.variants[].target: {rise: 0.03}", file=sys.stderr)
