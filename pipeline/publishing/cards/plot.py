"""The picture of a card: perplexity against size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.model_result import TEXTS
from pipeline.evaluation.results import BASE
from pipeline.publishing.cards import markdown
from pipeline.publishing.cards.about import ROOT, About
from pipeline.publishing.cards.markdown import Markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = Markdown("assets/quality_vs_size.png")
# Distinct with any kind of color vision (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#767676"


@dataclass(frozen=True)
class Point:
    """A model in the picture: key, label, bytes of its weights, perplexity and standard error."""

    model: str
    label: str
    stored: float
    value: float
    error: float | None


def points(about: About, variants: Sequence[str]) -> dict[str, list[Point]]:
    """Return the points by text. A text counts if the reference and at least one variant were measured on it."""
    panels = {}
    names = {ROOT: "root", BASE: "base model"}
    for text in TEXTS:
        found = []
        for model in dict.fromkeys((about.reference, *variants, BASE)):
            result = about.results[model]
            measured = markdown.rounded(result.on(text).perplexity)
            if measured and result.size_bytes:
                found.append(Point(model, names.get(model, model), result.size_bytes, measured[0], measured[1]))
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 3.8), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    largest = max(point.stored for panel in panels.values() for point in panel)
    unit, name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    for axes, (text, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw(axes, panel, about.reference, unit)
        axes.set_title(f"{TEXTS[text].capitalize()} text", loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(f"size of the weights, {name}")
        axes.set_xlim(0, 1.3 * largest / unit)
    figure.axes[0].set_ylabel("perplexity (lower is better)")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path, metadata={"Software": None})
    return True


def _draw(axes: Axes, panel: list[Point], reference: str, unit: float) -> None:
    level = next(point.value for point in panel if point.model == reference)
    axes.axhline(level, color=_COLORS[0], linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)
    drawn = [point for point in panel if point.model != BASE or reference == BASE]
    colors = {point.model: _COLORS[i % len(_COLORS)] for i, point in enumerate(drawn)}
    for point in panel:
        color, x = colors.get(point.model, _GREY), point.stored / unit
        is_beside = point.model in colors  # the base model is as large as the root, so its name goes left
        bars: dict[str, Any] = {
            "capsize": 3,
            "elinewidth": 1.2,
            "markersize": 7,
            "mfc": color if is_beside else "white",
        }
        axes.errorbar(x, point.value, yerr=point.error, fmt="o", color=color, zorder=3 if is_beside else 2, **bars)
        place: dict[str, Any] = {
            "xytext": (9 if is_beside else -9, 0),
            "ha": "left" if is_beside else "right",
            "va": "center",
        }
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        text: dict[str, Any] = {"color": color, "fontsize": 9, "linespacing": 1.3, "bbox": box}
        axes.annotate(
            f"{point.label}\n{point.value:.4g}", (x, point.value), textcoords="offset points", **place, **text
        )
    axes.margins(y=0.18)
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#8c959f")
    axes.tick_params(length=0, labelcolor="#57606a")
