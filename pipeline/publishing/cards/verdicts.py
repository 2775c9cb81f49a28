"""What a card says of variants that missed their gate: those that are there all the same, and those that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.catalog import EIGHT_BITS
from pipeline.evaluation.gates import SAID, is_unsure
from pipeline.publishing.cards import markdown
from pipeline.publishing.cards.about import TEXTS, About, place
from pipeline.publishing.cards.markdown import Markdown, code, count, estimate, listed, percent, plain, table, unit

_OPTIONS = {"group_size": "groups of {}", "rounding": "rounding {}", "embeddings": "embeddings {}"}


def missed(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown]]:
    """(name, what it missed) of the variants that were let in with a warning."""
    return [
        (name, _told(about.get(model, "gate")))
        for model, name in models.items()
        if about.get(model, "gate", "passed") is False
    ]


def withheld(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown, Markdown]]:
    """(name, what it was, what it missed) of the variants that were tried and are not in the release."""
    found = []
    for variant in about.get("withheld") or ():
        size, ratio, spec, verdict = (
            about.get("withheld", variant, key) for key in ("size_bytes", "ratio", "variant", "gate")
        )
        share = unit(markdown.share(ratio), f"of the {models[about.reference]}")
        found.append((place(variant), listed([markdown.size(size), share, _options(spec or {})]), _told(verdict)))
    return found


def ladders(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown]]:
    """(name, table) of the variants that were made in several ways until one passed."""
    tried = {model: about.get(model, "gate", "tried") for model in models}
    return [(models[model], _ladder(rungs)) for model, rungs in tried.items() if rungs]


def ladders_in_vain(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown]]:
    """(name, table) of the variants of which none of several ways passed."""
    tried = {variant: about.get("withheld", variant, "gate", "tried") for variant in about.get("withheld") or ()}
    return [(place(variant), _ladder(rungs)) for variant, rungs in tried.items() if rungs]


def _ladder(tried: Sequence[Mapping[str, Any]]) -> Markdown:
    """One row for each way, in the order in which they were tried."""
    headers, rows = ["", "Weights"], []
    texts = [text for text in TEXTS if any(text in (rung.get("quality") or {}) for rung in tried)]
    for text in texts:
        headers += [f"Rise on {TEXTS[text]} text", f"KL on {TEXTS[text]} text"]
    for rung in tried:
        measured = [(rung.get("quality") or {}).get(text) or {} for text in texts]
        figures = [
            figure
            for q in measured
            for figure in (estimate(q.get("rise"), percent=True, sign="+"), estimate(q.get("kl")))
        ]
        passed = Markdown("passes") if (rung.get("gate") or {}).get("passed") else Markdown("misses")
        rows.append([_options(rung.get("variant") or {}), markdown.size(rung.get("size_bytes")), *figures, passed])
    return table([*headers, "Gate"], rows)


def _options(spec: Mapping[str, Any]) -> Markdown:
    """How a variant was made that is not there to be looked at."""
    values = {key: plain(spec.get(key)) or code(spec.get(key) or "") for key in _OPTIONS}
    eight = unit(count(len(spec.get(EIGHT_BITS) or ()) or None), "layers in eight bits")
    return listed([*(Markdown(_OPTIONS[key].format(value)) for key, value in values.items() if value), eight])


def _told(verdict: Any) -> Markdown:
    """What was missed of a verdict, by how much."""
    checks = (verdict or {}).get("checks") or ()
    return listed((_check(check) for check in checks if check.get("passed") is False), "; ")


def _check(check: Mapping[str, Any]) -> Markdown | None:
    said, is_share = SAID.get(check.get("figure")), check.get("figure") != "kl"
    limit = (percent if is_share else plain)(check.get("limit"))
    figure, text = estimate(check, percent=is_share), TEXTS.get(check.get("text"))
    if not (said and figure and limit and text):
        return None
    over = "which with its error may be more than the limit of" if is_unsure(check) else "and the limit is"
    return Markdown(f"{said.format(figure)} on {text} text, {over} {limit}")
