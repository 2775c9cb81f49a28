"""The verbs of a run: `run`, `train`, `evaluate`, `status`, `sync` and `clean`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.machine import show_plan
from pipeline.cli.options import (
    RUNS,
    AsJson,
    ConfigArgument,
    Remove,
    Replace,
    ReplaceAdapter,
    Root,
    Settings,
    console,
    terminal_reporter,
)
from pipeline.system.text_format import size

if TYPE_CHECKING:
    from pipeline.cli.terminal import TerminalReporter
    from pipeline.config.schema import Config
    from pipeline.training.accelerate_launch import Launch
    from pipeline.workflow.workspace import Workspace

Accelerate = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="Train in several processes: ddp, fsdp-qlora, ..., or accelerate's YAML."),
]
MachineRank = Annotated[
    int | None, typer.Option(help="Number of this machine; machine 0 also does everything but training.")
]
MainProcessIp = Annotated[str | None, typer.Option(help="Address of machine 0.")]


def run(
    config: ConfigArgument,
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove an earlier run of this name first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    accelerate: Accelerate = None,
    machine_rank: MachineRank = None,
    main_process_ip: MainProcessIp = None,
    remove: Remove = None,
    replace: Replace = False,
    replace_adapter: ReplaceAdapter = False,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Run every stage, from base model and data set to a release; continues a stopped run."""
    from pipeline.config.loader import load_config
    from pipeline.errors import ConfigError
    from pipeline.workflow.kept_variants import removal
    from pipeline.workflow.run import run as run_all

    loaded = load_config(config, settings or ())
    launch = _launch(accelerate, machine_rank, main_process_ip)
    if dry_run and launch:
        raise ConfigError("--dry-run: plans one process, without --accelerate. Try: leave out one of them")
    if dry_run:
        return show_plan(loaded, None, runs, as_json)
    if launch and launch.machine_rank:
        return _join(loaded, launch, runs, as_json)
    reporter = terminal_reporter(as_json)
    agreed = removal(remove or (), replace, replace_adapter)
    workspace = run_all(loaded, runs, fresh, reporter, launch=launch, removal=agreed)
    conclude(loaded, workspace, as_json, reporter)


def train(
    config: ConfigArgument,
    settings: Settings = None,
    accelerate: Accelerate = None,
    machine_rank: MachineRank = None,
    main_process_ip: MainProcessIp = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Only train the adapter of a run."""
    launch = _launch(accelerate, machine_rank, main_process_ip)
    if launch and launch.machine_rank:
        from pipeline.config.loader import load_config

        return _join(load_config(config, settings or ()), launch, runs, as_json)
    run_stage("train", config, settings, runs, as_json, launch)


def evaluate(config: ConfigArgument, settings: Settings = None, runs: Root = RUNS, as_json: AsJson = False) -> None:
    """Only measure the merged model and the base model of a run."""
    run_stage("evaluate", config, settings, runs, as_json)


def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    last: Annotated[int, typer.Option(help="Number of events to show.", min=0)] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the steps of a run, finished, running or left, and its last events."""
    from pipeline.tracking.events import read_events
    from pipeline.workflow.run_state import run_state
    from pipeline.workflow.workspace import Workspace

    workspace = Workspace.open(folder)
    events = [e for e in read_events(workspace.events_path)[0] if "event" in e]
    state = run_state(workspace)
    if as_json:
        now = {"running": sorted(state.running), "left": state.left, "changed": state.changed, "removed": state.removed}
        print(json.dumps({"ledger": states(workspace), "events": events, **now}))
        return
    from pipeline.cli.terminal import show_status

    show_status(console(), state, workspace, events[-last:] if last else [])


def sync(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Send the tracker all records of a run that it missed."""
    from pipeline.config.loader import load_config
    from pipeline.tracking.trackers import sync as send_missed
    from pipeline.workflow.workspace import Workspace

    workspace = Workspace.open(folder)
    sent = send_missed(workspace.events_path, load_config(workspace.config_path, settings or ()))
    print(json.dumps({"run": str(workspace.folder), "sent": sent}) if as_json else f"{sent} records sent")


def clean(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Remove files that a release does not need: checkpoints, calibrations, unpacked base models, partial files."""
    from pipeline.workflow.cleanup import clean as remove
    from pipeline.workflow.workspace import Workspace

    workspace = Workspace.open(folder)
    freed, removed = remove(workspace)
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "freed_bytes": freed, "removed": removed}))
    else:
        print(f"{size(freed)} freed: {', '.join(removed)}" if removed else "nothing to remove")


def run_stage(
    stage: str,
    config: str,
    settings: list[str] | None,
    runs: Path,
    as_json: bool,
    launch: Launch | None = None,
    remove: list[str] | None = None,
    replace: bool = False,
) -> None:
    """Run one stage of a configuration."""
    from pipeline.config.loader import load_config
    from pipeline.workflow.kept_variants import removal
    from pipeline.workflow.run import run_one

    loaded, agreed = load_config(config, settings or ()), removal(remove or (), replace)
    workspace = run_one(loaded, stage, runs, terminal_reporter(as_json), launch=launch, removal=agreed)
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "ledger": states(workspace)}))


def conclude(config: Config, workspace: Workspace, as_json: bool, reporter: TerminalReporter) -> None:
    """Print the results of a run."""
    if as_json:
        from pipeline.system.files import read_json

        results = read_json(workspace.results_path, {})
        print(json.dumps({"run": str(workspace.folder), "release": str(workspace.release), "results": results}))
        return
    from pipeline.cli.terminal import summary

    summary(reporter.console, config, workspace)


def states(workspace: Workspace) -> dict:
    """Return the ledger's seconds and summary of each finished step."""
    return {key: {"seconds": e.seconds, "summary": e.summary} for key, e in workspace.ledger().items()}


def _launch(accelerate: str | None, machine_rank: int | None, main_process_ip: str | None) -> Launch | None:
    from pipeline.errors import ConfigError

    if accelerate is None:
        if machine_rank is not None or main_process_ip is not None:
            raise ConfigError("--machine-rank, --main-process-ip: need --accelerate")
        return None
    from pipeline.training.accelerate_launch import read_launch

    return read_launch(accelerate, machine_rank, main_process_ip)


def _join(config: Config, launch: Launch, runs: Path, as_json: bool) -> None:
    from pipeline.workflow.worker_node import join

    workspace = join(config, launch, runs, terminal_reporter(as_json))
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "machine_rank": launch.machine_rank}))
