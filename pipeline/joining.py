"""What another machine than the first does of a run: its part of the training, and nothing else."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.errors import Interrupted
from pipeline.events import Unheard
from pipeline.launch import Launch
from pipeline.preflight import preflight
from pipeline.process import run_stage
from pipeline.reporter import Reporter
from pipeline.workspace import Entry, Workspace


def join(config: Config, launch: Launch, root: str | Path = "runs", reporter: Reporter | None = None) -> Workspace:
    """Train along with machine 0, which does the rest of the run and has all that it makes.

    Returns:
        A folder beside the run's, with the logs of this machine.

    Raises:
        UserError: in one line, before any work where that is possible.
        StageFailed: where training failed, here or elsewhere.
    """
    preflight(config, need_hub=False, launch=launch)
    reporter, step = reporter or Reporter(), f"train (machine {launch.machine_rank} of {launch.machines})"
    with Workspace.claim(Path(root) / f".{config.name}.machine-{launch.machine_rank}", config) as workspace:
        reporter.begin(config, workspace)
        reporter.started(step)
        events = Unheard(workspace.events_path, config.name)
        try:
            report = run_stage("train", "train", (), workspace, events, reporter, reporter.tick, launch)
            reporter.finished(step, Entry("", summary=report.summary, seconds=report.seconds))
        except BaseException:
            reporter.failed(step)
            raise
        finally:
            reporter.end(None)
        if report.interrupted:
            raise Interrupted
    return workspace
