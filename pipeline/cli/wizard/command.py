"""The verb `wizard`. Every question has a command-line option that answers it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import RUNS, Root, console
from pipeline.config.calibration import QUALITIES
from pipeline.config.presets import PLACES, PRESETS

INTERRUPTED = 130
Text = str | None


def _answer(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Answers", show_default=False)


def wizard(
    model: Annotated[Text, _answer("A recipe, a model on the Hub, or a folder.")] = None,
    data: Annotated[Text, _answer("A file, a data set on the Hub, or builtin:python-docs.")] = None,
    columns: Annotated[
        Text, _answer("Names of columns, such as question=ASK,answer=REPLY, or the name of a form.")
    ] = None,
    profile: Annotated[Text, _answer("standard, conservative, aggressive, extreme.")] = None,
    epochs: Annotated[Text, _answer("Number of passes over the data.")] = None,
    max_steps: Annotated[Text, _answer("Stop after this many optimizer steps; no: train all epochs.")] = None,
    max_length: Annotated[Text, _answer("Maximum length of a sequence, in tokens.")] = None,
    batch_size: Annotated[Text, _answer("Sequences at a time.")] = None,
    repo: Annotated[Text, _answer("USER/NAME on the Hub, or none. The token comes from HF_TOKEN or the login.")] = None,
    private: Annotated[bool | None, _answer("Visibility of a new repository.", "--private/--public")] = None,
    track: Annotated[Text, _answer("local, a Space USER/NAME, the URL of a server, or a tracker's name.")] = None,
    quantize: Annotated[bool | None, _answer("Make quantized models.", "--quantize/--no-quantize")] = None,
    where: Annotated[Text, _answer(f"Where the quantized models will run: {', '.join(PLACES)}.")] = None,
    quantization: Annotated[Text, _answer(f"{', '.join(PRESETS)}; or variants such as int8,int4.")] = None,
    group_size: Annotated[Text, _answer("32, 64, 128 or 256, for int4.")] = None,
    gguf: Annotated[Text, _answer("GGUF types such as q4_0,q8_0, or none.")] = None,
    gate: Annotated[
        Text,
        _answer("If a variant fails its gate: withhold, warn, or target (more bits for int4), as rise=0.03, ..."),
    ] = None,
    quality: Annotated[Text, _answer(f"{', '.join(QUALITIES)}: each loses less and takes longer.")] = None,
    calibration_text: Annotated[
        Text, _answer("Text to calibrate on: training, files or data sets, separated by commas.")
    ] = None,
    name: Annotated[Text, _answer("Name of the run.")] = None,
    calibrate: Annotated[
        bool | None, _answer("Measure the speed of this machine.", "--calibrate/--no-calibrate")
    ] = None,
    file: Annotated[Text, _answer("Configuration file to write.")] = None,
    run: Annotated[bool | None, _answer("Start the run after the last answer.", "--run/--no-run")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take the defaults of all other questions.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="FILE", help="Continue with the answers of an interrupted wizard."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing configuration file.")] = False,
    runs: Root = RUNS,
) -> None:
    """Ask for everything that a run needs, write a configuration file, and start the run.

    Answers may also come through a pipe: one per line; an empty line takes the default. A token is never an
    option: set HF_TOKEN, log in with hf auth login, or type it when the wizard asks.
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
    print(f"wrote {written.path}")


_NO_ANSWERS = {"yes", "resume", "overwrite", "runs"}


def _become_run(config: Path, runs: Path) -> None:
    """Replace this process by the run. Only the run gets the token that was typed."""
    from pipeline.system.process_environment import with_own_package

    sys.stdout.flush()
    sys.stderr.flush()
    # -P: the current folder may have a `pipeline` of its own.
    command = [sys.executable, "-P", "-m", "pipeline", "run", str(config), "--runs", str(runs)]
    os.execve(sys.executable, command, with_own_package(os.environ))
