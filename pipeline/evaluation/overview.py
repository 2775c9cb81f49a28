"""The models of a run side by side: their figures as plain data, and the picture of perplexity against size."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.catalog import VARIANTS
from pipeline.evaluation.model_result import TEXTS, Estimate, ModelResult
from pipeline.evaluation.results import BASE, MERGED, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {BASE: "base model", MERGED: "merged model"}  # of the models that are not variants, for people
# Distinct with any kind of color vision (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#767676"
_SPEED = "tokens_per_second"


@dataclass(frozen=True)
class Point:
    """A model in the picture: key, label, bytes of its weights, perplexity and standard error."""

    model: str
    label: str
    stored: float
    value: float
    error: float | None


def side_by_side(results: Results) -> list[dict[str, Any]]:
    """Return the figures of each measured model as JSON knows them, in the catalogue's order, without missing ones."""
    found = results.models
    return [
        _figures(model, found[model])
        for model in (BASE, MERGED, *VARIANTS)
        if model in found and (found[model].quality or found[model].speed)
    ]


def _figures(model: str, result: ModelResult) -> dict[str, Any]:
    fast, gate = result.fastest, result.gate
    found: dict[str, Any] = {"model": model, "size_bytes": result.size_bytes}
    for text in TEXTS:
        quality = result.on(text)
        for figure in ("perplexity", "rise", "kl", "agreement"):
            measured = getattr(quality, figure) or Estimate()
            if math.isfinite(measured.value):
                found[f"{text}_{figure}"] = measured.value
                if figure == "perplexity" and math.isfinite(measured.stderr):
                    found[f"{text}_perplexity_stderr"] = measured.stderr
    if fast:
        found[_SPEED] = fast.decode_tokens_per_second
        found["peak_memory_bytes"] = fast.peak_memory_bytes
    found["passed"] = gate.passed if gate else None
    return {key: value for key, value in found.items() if value is not None}


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of such rows that are worth a plot, as `variants/FIGURE/MODEL`; sizes are in MB."""
    text = next((text for text in TEXTS if any(f"{text}_perplexity" in row for row in rows)), "")
    told = {"perplexity": (f"{text}_perplexity", 1), "size_mb": ("size_bytes", 1e6), _SPEED: (_SPEED, 1)}
    return {
        f"variants/{figure}/{row['model']}": row[key] / unit
        for figure, (key, unit) in told.items()
        for row in rows
        if key in row
    }


def draw_side_by_side(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Return the picture of such figures as PNG; None if no variant has a perplexity and a size."""
    panels: dict[str, list[Point]] = {}
    for text in TEXTS:
        for row in rows:
            if "size_bytes" in row and (value := row.get(f"{text}_perplexity")):
                model, error = row["model"], row.get(f"{text}_perplexity_stderr")
                point = Point(model, NAMES.get(model, model), row["size_bytes"], value, error)
                panels.setdefault(text, []).append(point)
    shown = [{point.model for point in panel} for panel in panels.values()]
    reference = MERGED if any(MERGED in models for models in shown) else BASE
    complete = {t: p for (t, p), models in zip(panels.items(), shown, strict=True) if models - NAMES.keys()}
    return draw(complete, reference) if complete else None


def draw(panels: Mapping[str, Sequence[Point]], reference: str) -> bytes:
    """Return a picture of perplexity against size as PNG, with standard errors.

    Args:
        panels: the points by text; at least one.
        reference: the model that the others are compared with, drawn as a line through its point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 3.8), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    largest = max(point.stored for panel in panels.values() for point in panel)
    unit, name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    for axes, (text, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw(axes, panel, reference, unit)
        axes.set_title(f"{TEXTS[text].capitalize()} text", loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(f"size of the weights, {name}")
        axes.set_xlim(0, 1.4 * largest / unit)
    figure.axes[0].set_ylabel("perplexity (lower is better)")
    picture = io.BytesIO()
    canvas.print_png(picture, metadata={"Software": None})
    return picture.getvalue()


def _draw(axes: Axes, panel: Sequence[Point], reference: str, unit: float) -> None:
    for level in (point.value for point in panel if point.model == reference):
        axes.axhline(level, color=_COLORS[0], linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)
    drawn = [point for point in panel if point.model != BASE or reference == BASE]
    colors = {point.model: _COLORS[i % len(_COLORS)] for i, point in enumerate(drawn)}
    for point in panel:
        color, x = colors.get(point.model, _GREY), point.stored / unit
        is_beside = point.model in colors  # the base model is as large as the merged model, so its name goes left
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
