"""The options that several verbs take, and the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.cli.terminal import TerminalReporter

ConfigArgument = Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe such as demo.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as train.epochs=2; repeatable."),
]
Root = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; everything else goes to stderr.")]
Remove = Annotated[
    list[str] | None,
    typer.Option("--remove", metavar="VARIANT", help="Remove this variant of an earlier release; repeatable."),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Remove every variant that the configuration or the options do not name.")
]
ReplaceAdapter = Annotated[
    bool,
    typer.Option("--replace-adapter", help="Remove an adapter that other people put at the root of the repository."),
]
RUNS = Path("runs")


def console(stderr: bool = False) -> Console:
    """Return a console on standard output or standard error."""
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False, soft_wrap=True)


def terminal_reporter(as_json: bool) -> TerminalReporter:
    """Return a reporter on standard output; on standard error if JSON goes to standard output."""
    from pipeline.cli.terminal import TerminalReporter

    return TerminalReporter(console(stderr=as_json))
