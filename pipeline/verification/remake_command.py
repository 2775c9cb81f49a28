"""The command line that makes a model of a release again from its lineage."""

from __future__ import annotations

import json
import shlex

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.evaluation.results import Origin
from pipeline.verification.lineage_claims import ADAPTER, Claims
from pipeline.verification.location import Place


def how_to_make(claims: Claims, place: Place, model: str) -> str:
    """Return the command line that makes a model again."""
    base, revision = _base(claims)
    if model in VARIANTS:
        if claims.has_root:
            base, revision = place.name, place.revision
        if model in (*claims.config.quantize.calibrated, *claims.config.quantize.targeted):
            return "tunepress run, with the configuration in tunepress.json"
        asked = {spec.name: spec for spec in claims.config.quantize.variants}
        return _quantize(asked.get(model, VariantSpec(name=model).resolved()), base, revision)
    if model == ADAPTER or claims.config.data:
        return "tunepress run, with the configuration in tunepress.json"
    trained = claims.results.adapter or Origin()
    adapter = _word(trained.hub_id or trained.source, "ADAPTER")
    kind = claims.results.merge.base if claims.results.merge else None
    how = ["--base", kind] if kind in ("nf4", "bf16") else []
    words = ["tunepress", "merge", base, adapter, "--output", "again", *how]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def _quantize(spec: VariantSpec, source: str, revision: str | None) -> str:
    words = ["tunepress", "quantize", source, "--output", "again", *(["--revision", revision] if revision else [])]
    default = VariantSpec(name=spec.name).resolved()
    changed = {key: value for key, value in spec.making().items() if value != getattr(default, key)}
    if not changed:
        return shlex.join([*words, "--variants", spec.name])
    return shlex.join([*words, "--set", f"quantize.variants=[{json.dumps({'name': spec.name, **changed})}]"])


def _base(claims: Claims) -> tuple[str, str | None]:
    """Return the base model, and its commit if it is on the Hub."""
    origin = claims.results.origin
    is_pinned = origin.hub_id and origin.revision and not origin.revision.startswith("-")
    source = origin.hub_id or origin.source or claims.config.model.source
    return _word(source, "MODEL"), origin.revision if is_pinned else None


def _word(said: str | None, otherwise: str) -> str:
    """Return a word of the lineage, or `otherwise` if a shell would take it for an option."""
    return said if said and not said.startswith("-") else otherwise
