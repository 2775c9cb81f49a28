"""The command line: a sub-command per verb, which parses and calls. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tunepress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model, merge it, quantize it and publish it, with every number measured.",
)

ConfigArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe such as demo.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as train.epochs=2. Repeatable."),
]
Root = Annotated[Path, typer.Option("--runs", help="Folder that the run's folder lies in.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines; the rest goes to stderr.")]
RUNS = Path("runs")


@app.command()
def run(
    config: ConfigArgument,
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run of this name left.")] = False,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Do the whole job, from a base model and a data set to a release; goes on where it stopped."""
    from pipeline.config_file import load_config
    from pipeline.run import run as run_all

    loaded = load_config(config, settings or ())
    reporter = _reporter(as_json)
    workspace = run_all(loaded, runs, fresh, reporter)
    _conclude(loaded, workspace, as_json, reporter)


def _stage_command(stage: str, text: str):
    def command(config: ConfigArgument, settings: Settings = None, runs: Root = RUNS, as_json: AsJson = False) -> None:
        from pipeline.config_file import load_config
        from pipeline.run import run_one

        loaded = load_config(config, settings or ())
        workspace = run_one(loaded, stage, runs, _reporter(as_json))
        if as_json:
            print(json.dumps({"run": str(workspace.folder), "ledger": _states(workspace)}))

    command.__doc__ = text
    app.command(name=stage)(command)


_stage_command("train", "Only fine-tune: data and base model to an adapter.")
_stage_command("merge", "Only merge the run's adapter into its base model.")
_stage_command("evaluate", "Only measure the merged model and its base.")
_stage_command("quantize", "Only make, load back and measure the run's variants.")


@app.command()
def publish(
    source: Annotated[str, typer.Argument(help="A finished run's folder, or a configuration.")],
    repo: Annotated[str | None, typer.Option("--repo", metavar="USER/NAME", help="Where to.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Publish a finished run, now or again; only what changed is sent."""
    from pipeline.config_file import load_config
    from pipeline.errors import WorkspaceError
    from pipeline.run import run_one
    from pipeline.workspace import Workspace

    settings = [f"publish.repo={repo}"] if repo else []
    settings += [f"publish.private={'true' if private else 'false'}"] if private is not None else []
    if Path(source).is_dir():
        workspace = Workspace.open(source)
        if workspace.config().name != workspace.folder.resolve().name:
            raise WorkspaceError(
                f"{source}: holds the run {workspace.config().name!r}; give the folder that name again"
            )
        runs, source = workspace.folder.resolve().parent, str(workspace.config_path)
    loaded = load_config(source, settings)
    workspace = run_one(loaded, "publish", runs, _reporter(as_json))
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "published": workspace.ledger()["publish"].summary}))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    last: Annotated[int, typer.Option(help="How many events to show.", min=0)] = 20,
    as_json: AsJson = False,
) -> None:
    """Show what is finished, and what happened."""
    from pipeline.events import read_events
    from pipeline.workspace import Workspace

    workspace = Workspace.open(folder)
    events = [e for e in read_events(workspace.events_path)[0] if "event" in e]
    if as_json:
        print(json.dumps({"ledger": _states(workspace), "events": events}))
        return
    from pipeline.terminal import show_status

    show_status(_console(), workspace, events[-last:] if last else [])


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A repository USER/NAME, a run such as runs/demo, or a model's folder.")],
    variant: Annotated[str | None, typer.Option(help="int8, int4, ...; without it the full model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
) -> None:
    """Talk to a model. Ends with an empty line, Ctrl-D or Ctrl-C."""
    from pipeline.chat import chat as talk

    talk(model, variant, device, new_tokens, _console())


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors and for machines."""
    from pipeline.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


def main() -> None:
    """The `tunepress` command: a line and an exit code for what a user can mend, a traceback for our bugs."""
    from pipeline.errors import UserError

    try:
        app()
    except UserError as error:
        print(f"tunepress: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _console(stderr: bool = False):
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False, soft_wrap=True)


def _reporter(as_json: bool):
    from pipeline.terminal import TerminalReporter

    return TerminalReporter(_console(stderr=as_json))


def _conclude(config, workspace, as_json: bool, reporter) -> None:
    if as_json:
        from pipeline.workspace import read_json

        results = read_json(workspace.results_path, {})
        print(json.dumps({"run": str(workspace.folder), "release": str(workspace.release), "results": results}))
        return
    from pipeline.terminal import summary

    summary(reporter.console, config, workspace)


def _states(workspace) -> dict:
    return {key: {"seconds": e.seconds, "summary": e.summary} for key, e in workspace.ledger().items()}


if __name__ == "__main__":
    main()
