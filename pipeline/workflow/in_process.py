"""A stage in the calling process, for tests and for people who debug a stage."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.system.files import no_room
from pipeline.tracking.events import Events
from pipeline.training.accelerate_launch import Launch
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.stage_process import Report
from pipeline.workflow.stages import failure_of, perform, tell_failure
from pipeline.workflow.workspace import Workspace


def run_stage_here(
    stage: str,
    variants: tuple[str, ...],
    workspace: Workspace,
    events: Events,
    reporter: Reporter,
    on_tick: Callable[[], None],
    launch: Launch | None = None,
) -> Report:
    """Run one stage as `stage_process.run_stage` does, but in this process, which keeps the stage's memory.

    Raises:
        StageFailed: with the stage's own message.
        Interrupted: after Ctrl-C.
    """
    config, start = workspace.config(), time.monotonic()
    telling = Events(events.path, events.run, reporter.progress, reporter.show)
    try:
        outcome = perform(stage, config, workspace, telling, variants)
    except KeyboardInterrupt as stopped:
        tell_failure(stage, events, variants, stopped, time.monotonic() - start)
        raise Interrupted from None
    except Exception as problem:
        error = no_room(problem, workspace.folder) or problem
        tell_failure(stage, events, variants, error, time.monotonic() - start)
        if not isinstance(error, UserError):
            traceback.print_exc()
        failure = failure_of(stage, variants, error)
        raise StageFailed(failure["told"], failure["exit_code"], workspace.log_of(stage, variants)) from error
    finally:
        on_tick()
    return Report(list(outcome.outputs), outcome.summary, time.monotonic() - start)
