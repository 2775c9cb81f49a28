"""Stages of a run: each module here does one verb and has the functions of the Protocol `Stage`.

A stage reads the outputs of earlier stages in the workspace, writes under a temporary name, renames, and returns an
`Outcome`. It runs in a process of its own (`pipeline.workflow.stage_process`). Heavy libraries are imported inside
`run`, so that the dependencies of a stage are found quickly.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from pipeline.errors import UserError
from pipeline.tracking.events import Events, one_line

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.workflow.workspace import Workspace


@dataclass(frozen=True)
class Outcome:
    """The result of a stage.

    Attributes:
        outputs: files, or whole folders, in the workspace.
        summary: its figures, as plain data.
        refusal: why its result is not released; the events then report a failure.
        is_final: False if a variant is made again with other settings; then no event reports an end.
    """

    outputs: tuple[Path, ...] = ()
    summary: dict = field(default_factory=dict)
    refusal: UserError | None = None
    is_final: bool = True


class Stage(Protocol):
    """One verb of a run."""

    def parameters(self, config: Config, variant: str | None) -> dict[str, Any]:
        """Return the fields of the stage's start event."""

    def depends(self, config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict[str, Any]:
        """Return the stage's dependencies as plain data: equal dependencies give an equal result."""

    def run(self, config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
        """Do the stage.

        Raises:
            UserError: if the user can correct the cause of a failure.
        """


@dataclass(frozen=True)
class Reporting:
    """The events of a stage: its verb, and which of the verb's events it sends.

    Attributes:
        follows_targets: True if it makes variants with the settings that their targets led to.
    """

    verb: str | None
    starts: bool = True
    completes: bool = True
    follows_targets: bool = False


REPORTING = {
    "train": Reporting("train"),
    "merge": Reporting("merge"),
    "evaluate": Reporting("evaluate"),
    "compare_published": Reporting("evaluate", starts=False, completes=False),  # a part of retraining
    "allocate": Reporting("quantize", starts=False, completes=False),  # a part of making the variants
    "calibrate": Reporting("quantize", starts=False, completes=False, follows_targets=True),  # another part
    "distill": Reporting("quantize", starts=False, completes=False, follows_targets=True),  # likewise
    # It writes the files of all variants ...
    "quantize": Reporting("quantize", completes=False, follows_targets=True),
    # ... each of which is then measured.
    "measure_variant": Reporting("quantize", starts=False, follows_targets=True),
    "render": Reporting(None, starts=False, completes=False),
    "publish": Reporting("publish"),
}


def stage_named(name: str) -> Stage:
    """Return the module of a stage."""
    return cast(Stage, importlib.import_module(f"{__name__}.{name}"))


def config_of(name: str, config: Config, workspace: Workspace) -> Config:
    """Return the configuration that a stage works with: stages that make variants follow their targets."""
    from pipeline.workflow.stages.allocate import allocated

    is_asked = not (REPORTING[name].follows_targets and config.quantize.targeted)
    return config if is_asked else allocated(config, workspace)


def perform(name: str, config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Do a stage in this process, and send its events, except its failure event (`tell_failure`)."""
    stage, reporting, start = stage_named(name), REPORTING[name], time.monotonic()
    config = config_of(name, config, workspace)
    if reporting.verb and reporting.starts:
        for variant in _subjects(reporting.verb, variants):
            events.emit(reporting.verb, "started", variant, **stage.parameters(config, variant))
    outcome = stage.run(config, workspace, events, variants)
    seconds = round(time.monotonic() - start, 3)
    if reporting.verb and reporting.completes and outcome.is_final:
        for variant in _subjects(reporting.verb, variants):
            if outcome.refusal:
                events.failed(reporting.verb, variant, outcome.refusal, seconds)
            else:
                events.emit(reporting.verb, "completed", variant, **{"seconds": seconds, **_short(outcome.summary)})
    return outcome


def tell_failure(
    name: str, events: Events, variants: tuple[str, ...], error: BaseException | str, seconds: float
) -> None:
    """Send the failure event of a stage, once for each of its variants."""
    if verb := REPORTING[name].verb:
        for variant in _subjects(verb, variants):
            events.failed(verb, variant, error, seconds)


def failure_of(name: str, variants: tuple[str, ...], error: BaseException, rank: int = 0, size: int = 1) -> dict:
    """Return the failure of a stage as plain data, for the process that started the stage.

    Args:
        rank: rank of the failed process.
        size: number of processes of the stage.
    """
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    place = f"process {rank} of {size}: " if kind and rank else ""
    subject = " ".join((REPORTING[name].verb or name, *variants))
    return {
        "type": type(error).__name__,
        "message": f"{place}{one_line(error)}",
        "told": f"{subject}: {place}{kind}{one_line(error)}",
        "exit_code": error.exit_code if isinstance(error, UserError) else 1,
        "rank": rank,
    }


def _subjects(verb: str, variants: tuple[str, ...]) -> tuple[str | None, ...]:
    return variants if verb == "quantize" else (None,)


def _short(summary: dict) -> dict:
    """Return the numbers and short texts of a summary, which belong in an event, without tables."""
    return {k: v for k, v in summary.items() if isinstance(v, (int, float, str, bool))}
