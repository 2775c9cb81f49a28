"""What the modules of the command line share: options that several verbs take, and the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.cli.terminal import TerminalReporter

ConfigArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe such as demo.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as train.epochs=2. Repeatable."),
]
Root = Annotated[Path, typer.Option("--runs", help="Folder that the run's folder lies in.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines; the rest goes to stderr.")]
RUNS = Path("runs")


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False, soft_wrap=True)


def terminal_reporter(as_json: bool) -> TerminalReporter:
    from pipeline.cli.terminal import TerminalReporter

    return TerminalReporter(console(stderr=as_json))
