"""The command line: a sub-command per verb, which parses and calls. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli_machine, cli_wizard
from pipeline.cli_options import RUNS, AsJson, ConfigArgument, Root, Settings, console

app = typer.Typer(
    name="tunepress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model, merge it, quantize it and publish it, with every number measured.",
)

Accelerate = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="Train in several processes: ddp, fsdp-qlora, ..., or accelerate's YAML."),
]
MachineRank = Annotated[int | None, typer.Option(help="Which of several machines this is; 0 does all but training.")]
MainProcessIp = Annotated[str | None, typer.Option(help="Address of machine 0, where machines meet.")]


@app.command()
def run(
    config: ConfigArgument,
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run of this name left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what that will take, as plan does.")] = False,
    accelerate: Accelerate = None,
    machine_rank: MachineRank = None,
    main_process_ip: MainProcessIp = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Do the whole job, from a base model and a data set to a release; goes on where it stopped."""
    from pipeline.config_file import load_config
    from pipeline.run import run as run_all

    loaded = load_config(config, settings or ())
    if dry_run:
        return cli_machine.show_plan(loaded, None, runs, as_json)
    launch = _launch(accelerate, machine_rank, main_process_ip)
    if launch and launch.machine_rank:
        return _join(loaded, launch, runs, as_json)
    reporter = _reporter(as_json)
    workspace = run_all(loaded, runs, fresh, reporter, launch=launch)
    _conclude(loaded, workspace, as_json, reporter)


Output = Annotated[Path | None, typer.Option("--output", help="A new folder, which becomes the release.")]
Variants = Annotated[str | None, typer.Option("--variants", help="int8, int4, both; several with commas.")]
Measure = Annotated[bool, typer.Option("--measure", help="Load back and measure; publishing does so in any case.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model on the Hub.")]


@app.command()
def train(
    config: ConfigArgument,
    settings: Settings = None,
    accelerate: Accelerate = None,
    machine_rank: MachineRank = None,
    main_process_ip: MainProcessIp = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Only fine-tune: data and base model to an adapter."""
    launch = _launch(accelerate, machine_rank, main_process_ip)
    if launch and launch.machine_rank:
        from pipeline.config_file import load_config

        return _join(load_config(config, settings or ()), launch, runs, as_json)
    _run_stage("train", config, settings, runs, as_json, launch)


@app.command()
def merge(
    source: Annotated[str, typer.Argument(metavar="CONFIG|BASE", help="A run's configuration, or a base model.")],
    adapter: Annotated[str | None, typer.Argument(help="An adapter trained elsewhere: a folder, or a Hub id.")] = None,
    output: Output = None,
    base: Annotated[str | None, typer.Option("--base", help="Merge into bf16 (the default), or nf4.")] = None,
    variants: Variants = None,
    measure: Measure = False,
    revision: Revision = None,
    settings: Settings = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Only merge the run's adapter; or merge an adapter from elsewhere: merge BASE ADAPTER --output DIR."""
    if _is_config(source):
        _refuse(
            source,
            adapter=adapter,
            output=output,
            base=base,
            variants=variants,
            revision=revision,
            measure=measure or None,
        )
        return _run_stage("merge", source, settings, runs, as_json)
    from pipeline.errors import ConfigError
    from pipeline.midway import merge_config

    if adapter is None or output is None:
        raise ConfigError(f"merge {source}: write it as merge BASE ADAPTER --output DIR, or merge CONFIG.yaml")
    asked = [variants] if variants else []
    _run_midway(
        merge_config(source, adapter, output, base or "auto", asked, measure, revision, settings or ()), output, as_json
    )


@app.command()
def evaluate(config: ConfigArgument, settings: Settings = None, runs: Root = RUNS, as_json: AsJson = False) -> None:
    """Only measure the run's full-precision model and its base."""
    _run_stage("evaluate", config, settings, runs, as_json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="CONFIG|MODEL", help="A run's configuration, or any model.")],
    output: Output = None,
    variants: Variants = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="32, 64, 128 or 256, for int4 (int8 if alone).")
    ] = None,
    rounding: Annotated[str | None, typer.Option("--rounding", help="search, hqq or rtn.")] = None,
    packing: Annotated[str | None, typer.Option("--packing", help="plain, or tile_packed for CUDA; for int4.")] = None,
    measure: Measure = False,
    revision: Revision = None,
    low_disk: Annotated[
        bool,
        typer.Option("--low-disk", help="Fetch shard by shard, and remove each when it was read."),
    ] = False,
    settings: Settings = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Only make the run's variants; or those of any model: quantize MODEL --output DIR --variants int8,int4."""
    given = {"variants": variants, "group_size": group_size, "rounding": rounding, "packing": packing}
    if _is_config(source):
        _refuse(source, output=output, measure=measure or None, revision=revision, low_disk=low_disk or None, **given)
        return _run_stage("quantize", source, settings, runs, as_json)
    from pipeline.errors import ConfigError
    from pipeline.midway import quantize_config

    told = [name for name, value in given.items() if value is not None]
    if told and any(setting.startswith("quantize.variants") for setting in settings or ()):
        raise ConfigError(f"--{told[0].replace('_', '-')} and --set quantize.variants: say it in one way")
    if output is None:
        raise ConfigError(f"quantize {source}: say where to, with --output DIR, or name a configuration (.yaml)")
    config = quantize_config(
        source, output, [variants or "both"], group_size, rounding, measure, revision, settings or (), packing, low_disk
    )
    _run_midway(config, output, as_json)


@app.command()
def publish(
    source: Annotated[str, typer.Argument(help="A finished run, a folder made by merge or quantize, or a CONFIG.")],
    repo: Annotated[str | None, typer.Option("--repo", metavar="USER/NAME", help="Where to.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    create_pr: Annotated[bool | None, typer.Option(help="Open a pull request instead, or again not.")] = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Publish what is finished, now or again; only what changed is sent."""
    from pipeline.config_file import load_config
    from pipeline.errors import ConfigError
    from pipeline.run import run as run_all
    from pipeline.run import run_one
    from pipeline.workspace import HIDDEN, Workspace

    settings = [f"publish.repo={repo}"] if repo else []
    for key, value in (("private", private), ("create_pr", create_pr)):
        settings += [f"publish.{key}={str(value).lower()}"] if value is not None else []
    output = None
    if Path(source).is_dir():
        workspace = Workspace.open(source)
        source = str(workspace.config_path)
        if workspace.config().evaluate is None:  # what is published is what was measured
            settings += ["evaluate={}", "model.low_disk=false"]
        if workspace.folder.name == HIDDEN:
            output = workspace.release
        else:
            _check_name(workspace)
            runs = workspace.folder.resolve().parent
    loaded = load_config(source, settings)
    if loaded.publish.repo is None:
        raise ConfigError("publish.repo: not set, so there is nowhere to publish to; use --repo USER/NAME")
    if loaded.data is None:  # it may have to be measured first
        workspace = run_all(loaded, runs, reporter=_reporter(as_json), output=output, publish_again=True)
    else:
        workspace = run_one(loaded, "publish", runs, _reporter(as_json))
    _say_published(workspace, as_json)


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

    show_status(console(), workspace, events[-last:] if last else [])


@app.command()
def sync(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Send Trackio what it missed of a run, without running anything."""
    from pipeline.config_file import load_config
    from pipeline.trackers import sync as send_missed
    from pipeline.workspace import Workspace

    workspace = Workspace.open(folder)
    sent = send_missed(workspace, load_config(workspace.config_path, settings or ()))
    print(json.dumps({"run": str(workspace.folder), "sent": sent}) if as_json else f"{sent} records sent")


@app.command()
def rollback(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="A repository that tunepress published to.")],
    to: Annotated[str | None, typer.Option("--to", metavar="TAG", help="By default the release before.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an older release of a repository its head again; people's own files and texts stay."""
    from pipeline.rollback import rollback as go_back

    done = go_back(repo, to)
    if as_json:
        print(json.dumps({"repo": repo, "tag": done.tag, "commit": done.commit.oid, "url": done.commit.url}))
    else:
        print(f"{repo} is at {done.tag}: {done.commit.url}")


@app.command()
def clean(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Remove what a release does not need: checkpoints, unpacked base models, what was interrupted."""
    from pipeline.cleaning import clean as remove
    from pipeline.terminal import size
    from pipeline.workspace import Workspace

    workspace = Workspace.open(folder)
    freed, removed = remove(workspace)
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "freed_bytes": freed, "removed": removed}))
    else:
        print(f"{size(freed)} freed: {', '.join(removed)}" if removed else "nothing to remove")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A repository USER/NAME, a run such as runs/demo, or a model's folder.")],
    variant: Annotated[str | None, typer.Option(help="int8, int4, gguf-q4_0, ...; without it the full model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the decoding step first; meant for CUDA.")
    ] = False,
) -> None:
    """Talk to a model. Ends with an empty line, Ctrl-D or Ctrl-C."""
    from pipeline.chat import chat as talk

    talk(model, variant, device, new_tokens, console(), compile)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors and for machines."""
    from pipeline.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


cli_machine.register(app)
cli_wizard.register(app)


def main() -> None:
    """The `tunepress` command: a line and an exit code for what a user can mend, a traceback for our bugs."""
    from pipeline.errors import UserError

    try:
        app()
    except UserError as error:
        print(f"tunepress: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _launch(accelerate: str | None, machine_rank: int | None, main_process_ip: str | None):
    from pipeline.errors import ConfigError

    if accelerate is None:
        if machine_rank is not None or main_process_ip is not None:
            raise ConfigError("--machine-rank and --main-process-ip: of use with --accelerate only")
        return None
    from pipeline.launch import read_launch

    return read_launch(accelerate, machine_rank, main_process_ip)


def _join(config, launch, runs: Path, as_json: bool) -> None:
    from pipeline.joining import join

    workspace = join(config, launch, runs, _reporter(as_json))
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "machine_rank": launch.machine_rank}))


def _run_stage(
    stage: str, config: str, settings: list[str] | None, runs: Path, as_json: bool, launch: object = None
) -> None:
    from pipeline.config_file import load_config
    from pipeline.run import run_one

    workspace = run_one(load_config(config, settings or ()), stage, runs, _reporter(as_json), launch=launch)
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "ledger": _states(workspace)}))


def _run_midway(config, output: Path, as_json: bool) -> None:
    from pipeline.run import run as run_all

    reporter = _reporter(as_json)
    workspace = run_all(config, reporter=reporter, output=output)
    _conclude(config, workspace, as_json, reporter)


def _say_published(workspace, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "published": workspace.ledger()["publish"].summary}))


def _check_name(workspace) -> None:
    from pipeline.errors import WorkspaceError

    if workspace.config().name != workspace.folder.resolve().name:
        name = workspace.config().name
        raise WorkspaceError(f"{workspace.folder}: holds the run {name!r}; give the folder that name again")


def _is_config(source: str) -> bool:
    """Is a verb's argument a configuration (a YAML file, or a shipped recipe), and not a model?"""
    from pipeline.config_file import shipped_configs

    return source.endswith((".yaml", ".yml")) or (source in shipped_configs() and not Path(source).is_dir())


def _refuse(config: str, **options: object) -> None:
    """Options for a model do not change what a configuration says."""
    from pipeline.errors import ConfigError

    given = next((name for name, value in options.items() if value is not None), None)
    if given:
        raise ConfigError(f"{config}: is a configuration, which says {given.replace('_', ' ')} itself; use --set")


def _reporter(as_json: bool):
    from pipeline.terminal import TerminalReporter

    return TerminalReporter(console(stderr=as_json))


def _conclude(config, workspace, as_json: bool, reporter) -> None:
    if as_json:
        from pipeline.files import read_json

        results = read_json(workspace.results_path, {})
        print(json.dumps({"run": str(workspace.folder), "release": str(workspace.release), "results": results}))
        return
    from pipeline.terminal import summary

    summary(reporter.console, config, workspace)


def _states(workspace) -> dict:
    return {key: {"seconds": e.seconds, "summary": e.summary} for key, e in workspace.ledger().items()}


if __name__ == "__main__":
    main()
