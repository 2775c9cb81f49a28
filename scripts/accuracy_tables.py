"""The tables of the accuracy benchmark."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.evaluation.model_result import Answer

WIDTH = 210  # columns of a table that goes to a file


def show(
    rows: list[dict], answers: list[tuple[str, Sequence[Answer]]], grid: dict | None, missing: Sequence[str] = ()
) -> None:
    """Print quality, then costs, then answers.

    Args:
        rows: the figures of all models.
        answers: the answers of each model to the same prompts.
        grid: how far an embedded model moved when its channels were reordered.
        missing: why some rows are missing.
    """
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if grid:
        console.print(
            f"measured {grid['measured']} the grid; off and on it, logits differ by {grid['moved']:.1e} of their norm, "
            f"the first choice at {1 - grid['same_first_choice']:.1%} of {grid['tokens']} tokens"
        )
    console.print(_quality(rows))
    if any(row["flattered"] or (row["second"] or {}).get("flattered") for row in rows):
        console.print(
            "* the loss rises by less than 0.9 of the KL divergence: perplexity says too little of the damage"
        )
    for reason in missing:
        console.print(f"missing: {reason}")
    console.print(_costs(rows))
    for number, question in enumerate(answer.prompt for answer in answers[0][1]):
        console.print(f"\n[bold]{escape(question)}[/]")
        for label, given in answers:
            console.print(f"[dim]{label}:[/] {escape(' '.join(given[number].answer.split()))}")


def _quality(rows: list[dict]) -> Table:
    has_second = any(row["second"] for row in rows)
    second = ("2nd text:\nperplexity", "rise %", "KL", "loss/KL") if has_second else ()
    text = ("perplexity", "rise %", "KL", "loss/KL", "agreement %")
    table = Table("", "MB", "layers:\nbits", "tables:\nbits", *text, *second, "")
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        other = row["second"] or dict.fromkeys(("perplexity", "rise", "kl", "loss_to_kl", "flattered"))
        beside = [_figure(other["perplexity"]), _figure(other["rise"], 100), _figure(other["kl"]), _ratio(other)]
        table.add_row(
            _label(row),
            f"{row['size_bytes'] / 1e6:.1f}",
            _number(row["bits"].get("layers"), 1, 2),
            _number(row["bits"].get("tables"), 1, 2),
            _figure(row["perplexity"]),
            _figure(row["rise"], 100),
            _figure(row["kl"]),
            _ratio(row),
            _figure(row["agreement"], 100),
            *(beside if has_second else ()),
            {True: "PASS", False: "FAIL", None: ""}[row["passed"]],
        )
    return table


def _costs(rows: list[dict]) -> Table:
    table = Table("", "making s", "making MB", "memory MB", "first token s", "ms a token")
    for row in rows:
        making = row["making"]
        table.add_row(
            _label(row),
            ("at least " if making["resumed"] else "") + _number(making["seconds"], 1, 1),
            _number(making["peak_memory_bytes"], 1e-6, 0),
            _number(row["peak_memory_bytes"], 1e-6, 0),
            _number(row["first_token_seconds"], 1, 2),
            _number(row["token_seconds"], 1e3, 1),
        )
    return table


def _label(row: dict) -> str:
    return ("  tried: " if row["tried"] else "") + row["way"]


def _ratio(quality: dict) -> str:
    return _number(quality["loss_to_kl"], 1, 2) + ("*" if quality["flattered"] else "")


def _figure(figure: dict | None, unit: float = 1) -> str:
    """Return a value and its standard error, with two digits of the error."""
    if not figure:
        return ""
    value, error = unit * figure["value"], unit * (figure["stderr"] or 0)
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3
    return f"{value:.{decimals}f}" + ("" if figure["stderr"] is None else f" ± {error:.{decimals}f}")


def _number(value: float | None, unit: float, decimals: int) -> str:
    return "" if value is None else f"{unit * value:.{decimals}f}"
