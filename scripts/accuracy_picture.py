"""The picture of the accuracy benchmark: loss against size, with paired errors."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

# (color, marker) by what made a row; the colors are told apart with any color vision.
MARKERS = ("o", "s", "D", "P", "X", "*")
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PEER_COLOR, PEER_MARKERS = "#D55E00", ("v", "^")
GRAY = "#6e7781"
LABEL = 44  # characters of a line in the list
APART = 12  # points between the numbers of rows that lie together


def draw(rows: list[dict], title: str, parameters: int | None, path: Path) -> None:
    """Draw rise of perplexity and KL divergence against size, both logarithmic; numbers refer to the list beside.

    Rows without a rise, such as the full-precision model, are left out. Losses below the smallest error are drawn
    at that error, with an arrow.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted((row for row in rows if row["rise"]), key=lambda row: (row["size_bytes"], row["kl"]["value"]))
    if not shown:
        return
    figure = Figure(figsize=(13, 5.6), dpi=140, layout="constrained", facecolor="white")
    canvas, (rise, kl, listed) = FigureCanvasAgg(figure), figure.subplots(1, 3, width_ratios=(4, 4, 3.4))
    styles = _styles({row["kind"]: row["peer"] for row in shown})
    for axes, figure_name, unit, label in (
        (rise, "rise", 100, "rise of perplexity, %"),
        (kl, "kl", 1, "KL divergence, nats per token"),
    ):
        _panel(axes, shown, styles, parameters, figure_name, unit, label)
    _list(listed, shown, styles)
    rise.set_title(f"{title} (hollow: misses its gate)", loc="left", fontsize=11, fontweight="bold")
    canvas.print_png(path, metadata={"Software": None})


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those of (size, loss) that no other is below in both, by size."""
    found: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not found or loss < found[-1][1]:
            found.append((size, loss))
    return found


def _styles(kinds: dict[str, bool]) -> dict[str, tuple[str, str]]:
    """Return color and marker of each kind; those of the other quantizer share one color.

    Args:
        kinds: by kind, whether the other quantizer made it.
    """
    ours = [kind for kind, is_peer in kinds.items() if not is_peer]
    others = [kind for kind, is_peer in kinds.items() if is_peer]
    found = {kind: (COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)]) for n, kind in enumerate(ours)}
    return found | {kind: (PEER_COLOR, PEER_MARKERS[n % len(PEER_MARKERS)]) for n, kind in enumerate(sorted(others))}


def _panel(axes, rows: list[dict], styles: dict, parameters: int | None, figure: str, unit: float, label: str) -> None:
    positive = [unit * row[figure]["value"] for row in rows if row[figure]["value"] > 0]
    floor = 0.7 * min(positive, default=1e-3 * unit)
    places = [(row["size_bytes"] / 1e6, max(unit * row[figure]["value"], floor)) for row in rows]
    best = frontier(places)
    axes.step(*zip(*best, strict=True), where="post", color="#c9d1d9", linewidth=1.2, zorder=1)
    axes.set_yscale("log")
    for row, (size, loss) in zip(rows, places, strict=True):
        color, marker = styles[row["kind"]]
        error = unit * (row[figure]["stderr"] or 0)
        axes.errorbar(
            size, loss, yerr=[[min(error, loss - 0.5 * floor)], [error]], fmt=marker, capsize=2, color=color,
            elinewidth=0.9, mfc="white" if row["passed"] is False else color,
            markersize=4 if row["tried"] else 7, zorder=3,
        )  # fmt: skip
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel(label)
    axes.margins(x=0.12, y=0.08)
    axes.grid(which="major", color="#d8dee4", linewidth=0.8)
    axes.grid(which="minor", axis="y", color="#eef1f4", linewidth=0.6)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    if parameters:
        factor = 8e6 / parameters
        top = axes.secondary_xaxis("top", functions=(lambda mb: mb * factor, lambda bits: bits / factor))
        top.set_xlabel("bits a weight, of the whole model", fontsize=9, color=GRAY)
        top.tick_params(colors=GRAY, labelsize=8)
    _number(axes, places)


def _number(axes, places: list[tuple[float, float]]) -> None:
    """Write the number of each row to the right of its marker, and above those that are there already."""
    axes.figure.draw_without_rendering()  # or the scale would not be known
    taken: list[tuple[float, float]] = []
    scale = 72 / axes.figure.dpi
    for number, place in sorted(enumerate(places, 1), key=lambda item: item[1][1]):
        x, y = (scale * value for value in axes.transData.transform(place))
        right, up = x + 7, y
        while any(abs(right - other) < 1.3 * APART and abs(up - beside) < APART - 3 for other, beside in taken):
            up += 1
        taken.append((right, up))
        axes.annotate(
            str(number), place, xytext=(right - x, up - y), textcoords="offset points", fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": "#c9d1d9", "linewidth": 0.7} if up - y > 4 else None,
        )  # fmt: skip


def _list(axes, rows: list[dict], styles: dict) -> None:
    axes.axis("off")
    axes.set_ylim(len(rows) + len(styles) + 1.5, -0.5)
    axes.set_xlim(0, 1)
    axes.text(1.15, 0, "bits of layers", fontsize=8, va="center", ha="right", color=GRAY)
    for number, row in enumerate(rows, 1):
        bits = f"{row['bits']['layers']:.2f}" if row["bits"] else ""
        axes.text(0.0, number, f"{number}", fontsize=8, va="center", ha="left", color=GRAY)
        color, marker = styles[row["kind"]]
        axes.plot(0.1, number, marker, color=color, markersize=5, clip_on=False)
        axes.text(0.15, number, textwrap.fill(row["way"], LABEL), fontsize=8, va="center")
        axes.text(1.15, number, bits, fontsize=8, va="center", ha="right", color=GRAY)
    for line, (kind, (color, marker)) in enumerate(styles.items(), len(rows) + 2):
        axes.plot(0.1, line, marker, color=color, markersize=7, clip_on=False)
        axes.text(0.15, line, kind, fontsize=9, va="center", fontweight="bold")
