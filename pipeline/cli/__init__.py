"""The command line: one sub-command for each verb, which parses and calls."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import machine, models, releases, runs
from pipeline.cli.wizard import command

app = typer.Typer(
    name="tunepress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune, merge, quantize and publish a language model, with every published number measured.",
)
VERBS = (
    runs.run, runs.train, models.merge, runs.evaluate, models.quantize, releases.publish, runs.status, runs.sync,
    releases.rollback, releases.verify, runs.clean, models.chat, models.sensitivity, machine.schema, machine.plan,
    machine.doctor,
    command.wizard,
)  # fmt: skip
for verb in VERBS:
    app.command()(verb)


def _tell_version(asked: bool) -> None:
    if asked:
        from pipeline.publishing.lineage import own_version

        print(f"tunepress {own_version()}")
        raise typer.Exit


@app.callback()
def _before_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Do what every verb needs first: nothing."""


def main() -> None:
    """Run the `tunepress` command."""
    from pipeline.cli.exit_codes import plain_errors

    with plain_errors("tunepress"):
        app()
