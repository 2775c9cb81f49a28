"""The picture of a card: perplexity against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluation.model_result import TEXTS
from pipeline.evaluation.overview import NAMES, Point, draw
from pipeline.evaluation.results import BASE
from pipeline.publishing.cards import markdown
from pipeline.publishing.cards.about import About
from pipeline.publishing.cards.markdown import Markdown

PLOT = Markdown("assets/quality_vs_size.png")


def points(about: About, variants: Sequence[str]) -> dict[str, list[Point]]:
    """Return the points by text. A text counts if the reference and at least one variant were measured on it."""
    panels = {}
    for text in TEXTS:
        found = []
        for model in dict.fromkeys((about.reference, *variants, BASE)):
            result = about.results[model]
            measured = markdown.rounded(result.on(text).perplexity)
            if measured and result.size_bytes:
                found.append(Point(model, NAMES.get(model, model), result.size_bytes, measured[0], measured[1]))
        shown = {point.model for point in found}
        if about.reference in shown and shown & set(variants):
            panels[text] = found
    return panels


def plot_quality(about: About, variants: Sequence[str], path: Path) -> bool:
    """Draw perplexity against size, one panel for each text, with standard errors.

    Returns:
        False if there is nothing to plot; then no file is written.
    """
    panels = points(about, variants)
    if not panels:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw(panels, about.reference))
    return True
