"""The verbs that change nothing: `plan`, `doctor` and `schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import RUNS, AsJson, ConfigArgument, Root, Settings, console

if TYPE_CHECKING:
    from pipeline.config.schema import Config

DOES_NOT_FIT = 3  # exit code, without an error


def plan(
    config: ConfigArgument,
    device: Annotated[
        str | None, typer.Option("--device", help="GPU to plan for, such as h100-80gb (default: this machine).")
    ] = None,
    settings: Settings = None,
    data: Annotated[
        bool | None,
        typer.Option(
            "--data/--no-data",
            help="Read every row and download a data set on the Hub for that (default: only files up to 50 MB).",
        ),
    ] = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Show the disk, network and memory that a run needs, and settings that make it fit.

    Exit codes: 0 it fits; 3 it does not fit; 2 an error that you can correct.
    """
    from pipeline.config.loader import load_config

    show_plan(load_config(config, settings or ()), device, runs, as_json, data)


def show_plan(config: Config, device: str | None, runs: Path, as_json: bool, read_rows: bool | None = None) -> None:
    """Print the plan of a configuration.

    Raises:
        typer.Exit: with `DOES_NOT_FIT` if the run does not fit.
    """
    from pipeline.planning import make_plan
    from pipeline.planning.report import as_json as plain
    from pipeline.planning.report import show
    from pipeline.workflow.preflight import check_inputs, check_training_here

    check_inputs(config)
    if config.data and device is None:
        check_training_here(config)
    made = make_plan(config, device, runs, read_rows)
    if as_json:
        print(json.dumps(plain(made)))
    else:
        show(console(), made)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


def doctor(
    calibrate: Annotated[
        bool | None,
        typer.Option("--calibrate/--no-calibrate", help="Measure the speed (default: once on each machine)."),
    ] = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Show devices, kernels, versions, disk and login of this machine, and measure its speed for plans."""
    from pipeline.planning.doctor import examine, show

    found = examine(runs, calibrate, lambda what: console(stderr=True).print(f"[dim]measuring: {what}[/]"))
    if as_json:
        print(json.dumps(found))
    else:
        show(console(), found)


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all keys as Markdown tables.")] = False,
) -> None:
    """Print the JSON schema of the configuration, for editors and programs."""
    from pipeline.config import document

    print(document.markdown() if markdown else json.dumps(document.json_schema(), indent=2))
