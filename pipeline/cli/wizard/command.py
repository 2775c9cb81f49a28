"""The verb that asks: `wizard`. Every question has an option that answers it ahead."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import RUNS, Root, console

INTERRUPTED = 130
Text = str | None


def _answer(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Answers", show_default=False)


def wizard(
    model: Annotated[Text, _answer("A recipe, a model on the Hub, or a folder.")] = None,
    data: Annotated[Text, _answer("A file, a data set on the Hub, or builtin:python-docs.")] = None,
    columns: Annotated[Text, _answer("Such as question=ASK,answer=REPLY; or the name of a form.")] = None,
    profile: Annotated[Text, _answer("standard, conservative, aggressive, extreme.")] = None,
    epochs: Annotated[Text, _answer("Passes over the data.")] = None,
    max_steps: Annotated[Text, _answer("Exactly so many steps instead of passes, or no.")] = None,
    max_length: Annotated[Text, _answer("Longest sequence, in tokens.")] = None,
    batch_size: Annotated[Text, _answer("Sequences at a time.")] = None,
    repo: Annotated[
        Text, _answer("USER/NAME on the Hub, or none; its token is taken from HF_TOKEN or the login.")
    ] = None,
    private: Annotated[bool | None, _answer("Visibility of a new repository.", "--private/--public")] = None,
    track: Annotated[Text, _answer("Trackio: local, a Space USER/NAME, or a server's address.")] = None,
    quantize: Annotated[bool | None, _answer("Make quantized models.", "--quantize/--no-quantize")] = None,
    quantization: Annotated[Text, _answer("balanced, high_quality, edge, gpu_optimized; or int8, int4, both.")] = None,
    group_size: Annotated[Text, _answer("32, 64, 128 or 256, for int4.")] = None,
    gguf: Annotated[Text, _answer("GGUF types such as q4_0,q8_0, or none.")] = None,
    gate: Annotated[Text, _answer("A variant that loses too much: withhold, warn, or escalate.")] = None,
    name: Annotated[Text, _answer("The run's name.")] = None,
    calibrate: Annotated[
        bool | None, _answer("Measure how fast this machine is.", "--calibrate/--no-calibrate")
    ] = None,
    file: Annotated[Text, _answer("Where the configuration is written.")] = None,
    run: Annotated[bool | None, _answer("Start when everything is answered.", "--run/--no-run")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take the defaults of all other questions.")] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="Go on with the answers that Ctrl-C left.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a configuration that is there.")] = False,
    runs: Root = RUNS,
) -> None:
    """Ask for everything a run needs, check each answer at once, write a configuration file, and run it.

    Answers may also come through a pipe, one a line, where an empty line takes the default. A token is never an
    option: set HF_TOKEN, log in with hf auth login, or be asked for it without echo.
    """
    given = {key.replace("_", "-"): value for key, value in locals().items() if key not in _NO_ANSWERS}
    from pipeline.cli.wizard import wizard as ask
    from pipeline.cli.wizard.prompts import answer_text
    from pipeline.cli.wizard.session import Stopped

    answers = {key: answer_text(value) for key, value in given.items() if value is not None}
    try:
        written = ask(console(), answers, resume, yes, runs, overwrite)
    except Stopped as stopped:
        print(f"\ntunepress: {stopped}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if written.start:
        _become_run(written.path, runs)
    print(f"{written.path} is written")


_NO_ANSWERS = {"yes", "resume", "overwrite", "runs"}


def _become_run(config: Path, runs: Path) -> None:
    """Replace this process by the run. Only the run gets the token that was typed."""
    from pipeline.system.process_environment import with_own_package

    sys.stdout.flush()
    sys.stderr.flush()
    # -P: the folder that the user stands in may have a `pipeline` of its own.
    command = [sys.executable, "-P", "-m", "pipeline", "run", str(config), "--runs", str(runs)]
    os.execve(sys.executable, command, with_own_package(os.environ))
