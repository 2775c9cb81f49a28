"""A run on another machine than the first: it takes part in training and does nothing else."""

from __future__ import annotations

from pathlib import Path

from pipeline import data
from pipeline.config.schema import Config, TrainingRun
from pipeline.errors import Interrupted
from pipeline.models import sources
from pipeline.tracking.events import SilentEvents
from pipeline.training.accelerate_launch import Launch
from pipeline.workflow.preflight import check_shared
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.stage_process import run_stage
from pipeline.workflow.workspace import Entry, Workspace

GRACE_SECONDS = 2.0  # short: nothing is lost here, and before the machines have met, no signal ends the process


def join(config: Config, launch: Launch, root: str | Path = "runs", reporter: Reporter | None = None) -> Workspace:
    """Train together with machine 0, which does the rest of the run and stores its outputs.

    Returns:
        A workspace beside the run's, with the logs of this machine.

    Raises:
        UserError: in one line, before the training if possible.
        StageFailed: if training failed on any machine.
    """
    check_shared(config, launch)
    assert isinstance(config, TrainingRun), "check_shared refuses a run without data"
    sources.check_source(config.model)
    data.check_source(config.data)
    reporter, step = reporter or Reporter(), f"train (machine {launch.machine_rank} of {launch.machines})"
    with Workspace.claim(Path(root) / f".{config.name}.machine-{launch.machine_rank}", config) as workspace:
        reporter.begin(config, workspace)
        reporter.started(step)
        reporter.show([f"waiting for machine 0 at {launch.main_process_ip}; stop this if its training is finished"])
        events = SilentEvents(workspace.events_path, config.name)
        try:
            report = run_stage("train", (), workspace, events, reporter, reporter.tick, launch, grace=GRACE_SECONDS)
            reporter.finished(step, Entry("", summary=report.summary, seconds=report.seconds))
        except BaseException:
            reporter.failed(step)
            raise
        finally:
            reporter.end(None)
        if report.interrupted:
            raise Interrupted
    return workspace
