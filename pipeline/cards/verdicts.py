"""What a card says of variants that missed their gate: those that are there all the same, and those that are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.cards import markdown
from pipeline.cards.about import TEXTS, About, place
from pipeline.cards.markdown import Markdown, code, estimate, listed, number, plain, unit
from pipeline.gates import SAID

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
    for variant, tried in (about.get("withheld") or {}).items():
        share = unit(markdown.share(tried.get("ratio")), f"of the {models[about.reference]}")
        what = listed([markdown.size(tried.get("size_bytes")), share, _options(tried.get("variant") or {})])
        found.append((place(variant), what, _told(tried.get("gate"))))
    return found


def _options(spec: Mapping[str, Any]) -> Markdown:
    """How a variant was made that is not there to be looked at."""
    values = {key: plain(spec.get(key)) or code(spec.get(key) or "") for key in _OPTIONS}
    return listed(Markdown(_OPTIONS[key].format(value)) for key, value in values.items() if value)


def _told(verdict: Any) -> Markdown:
    """What was missed of a verdict, by how much."""
    checks = (verdict or {}).get("checks") or ()
    return listed((_check(check) for check in checks if check.get("passed") is False), "; ")


def _check(check: Mapping[str, Any]) -> Markdown | None:
    said, scale = SAID.get(check.get("figure")), 1 if check.get("figure") == "kl" else 100
    figure, limit = estimate(check, percent=scale == 100), number(check.get("limit"))
    if said is None or figure is None or limit is None:
        return None
    text = TEXTS.get(check.get("text"), "a")
    allowed = f"{plain(round(scale * limit, 9))}" + (" %" if scale == 100 else "")
    line = f"{said.format(figure)} on {text} text, and the limit is {allowed}"
    return Markdown(line + (", which that may be above by its error" if check["value"] <= limit else ""))
