"""The lines of a card about variants that missed their limits, published with a warning or withheld."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.evaluation.gates import SAID
from pipeline.evaluation.model_result import TEXTS, Check, ModelResult, VariantSettings, Verdict
from pipeline.publishing.cards import markdown
from pipeline.publishing.cards.about import About, place
from pipeline.publishing.cards.markdown import Markdown, code, count, estimate, listed, percent, plain, table, unit


def missed(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown]]:
    """Return (name, missed limits) of the variants that are published with a warning."""
    verdicts = ((name, about.results[model].gate) for model, name in models.items())
    return [(name, _told(gate)) for name, gate in verdicts if gate and gate.passed is False]


def withheld(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown, Markdown]]:
    """Return (name, description, missed limits) of the variants that were made and withheld."""
    found = []
    for variant, result in about.results.withheld.items():
        share = unit(markdown.share(result.ratio), f"of the {models[about.reference]}")
        described = listed([markdown.size(result.size_bytes), share, _options(result.variant)])
        found.append((place(variant), described, _told(result.gate)))
    return found


def ladders(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown]]:
    """Return (name, table) of the variants that were made in several ways until one passed its gate."""
    tried = ((name, about.results[model].gate) for model, name in models.items())
    return [(name, _ladder(gate.tried)) for name, gate in tried if gate and gate.tried]


def ladders_in_vain(about: About, models: Mapping[str, Markdown]) -> list[tuple[Markdown, Markdown]]:
    """Return (name, table) of the variants that were made in several ways, none of which passed."""
    tried = ((place(variant), result.gate) for variant, result in about.results.withheld.items())
    return [(name, _ladder(gate.tried)) for name, gate in tried if gate and gate.tried]


def _ladder(tried: Sequence[ModelResult]) -> Markdown:
    """Return a table with one row for each way to make a variant, in the order of the attempts."""
    headers, rows = ["", "Weights"], []
    texts = [text for text in TEXTS if any(text in way.quality for way in tried)]
    for text in texts:
        headers += [f"Rise on {TEXTS[text]} text", f"KL on {TEXTS[text]} text"]
    for way in tried:
        figures = []
        for text in texts:
            figures += [estimate(way.on(text).rise, percent=True, sign="+"), estimate(way.on(text).kl)]
        passed = Markdown("passes") if way.gate and way.gate.passed else Markdown("misses")
        rows.append([_options(way.variant), markdown.size(way.size_bytes), *figures, passed])
    return table([*headers, "Limits"], rows)


def _options(variant: VariantSettings | None) -> Markdown:
    """Return the settings that a variant was made with."""
    made = variant or VariantSettings()
    options = (
        markdown.said("groups of {}", plain(made.group_size)),
        markdown.said("rounding {}", code(made.rounding or "")),
        markdown.said("embeddings {}", code(made.embeddings or "")),
        unit(count(len(made.int8) or None), "layers in eight bits"),
    )
    return listed(options)


def _told(verdict: Verdict | None) -> Markdown:
    """Return the missed limits of a verdict, each with its figure."""
    return listed((_check(check) for check in verdict.missed), "; ") if verdict else Markdown("")


def _check(check: Check) -> Markdown | None:
    said, is_share = SAID.get(check.figure or ""), check.figure != "kl"
    limit = (percent if is_share else plain)(check.limit)
    figure, text = estimate(check, percent=is_share), TEXTS.get(check.text or "")
    if not (said and figure and limit and text):
        return None
    over = "which with its error may be more than the limit of" if check.is_unsure else "and the limit is"
    return Markdown(f"{said.format(figure)} on {text} text, {over} {limit}")
