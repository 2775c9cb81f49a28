"""One verb each, all with the same shape: the Protocol `Stage`, which each module here provides.

A stage reads what earlier stages left in the workspace, writes under a temporary name, renames, and says what it
made. It runs in a process of its own (`pipeline.workflow.stage_process`). Heavy libraries are imported inside `run`,
so that asking what a stage depends on is quick.
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
    """What a stage made.

    Attributes:
        outputs: files, or whole folders, in the workspace.
        summary: its figures, as plain data.
        refusal: why what was made is not taken; the stage's end is then a failure in the events.
    """

    outputs: tuple[Path, ...] = ()
    summary: dict = field(default_factory=dict)
    refusal: UserError | None = None


class Stage(Protocol):
    """One verb of a run."""

    def parameters(self, config: Config, variant: str | None) -> dict[str, Any]:
        """Return what the stage's start event tells."""

    def depends(self, config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict[str, Any]:
        """Return plain data: the same data, the same result."""

    def run(self, config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
        """Do the stage.

        Raises:
            UserError: if people can mend what keeps it from being done.
        """


@dataclass(frozen=True)
class Reporting:
    """How a stage appears in the events: as which verb, and which of the verb's events it sends."""

    verb: str | None
    starts: bool = True
    completes: bool = True


REPORTING = {
    "train": Reporting("train"),
    "merge": Reporting("merge"),
    "evaluate": Reporting("evaluate"),
    "compare_published": Reporting("evaluate", starts=False, completes=False),  # a part of retraining
    "quantize": Reporting("quantize", completes=False),  # writes the files of all variants ...
    "measure_variant": Reporting("quantize", starts=False),  # ... each of which is then measured
    "render": Reporting(None, starts=False, completes=False),
    "publish": Reporting("publish"),
}


def stage_named(name: str) -> Stage:
    """Return the module of a stage."""
    return cast(Stage, importlib.import_module(f"{__name__}.{name}"))


def perform(name: str, config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Do a stage in this process, and send its events, but for that of its failure (`tell_failure`)."""
    stage, reporting, start = stage_named(name), REPORTING[name], time.monotonic()
    if reporting.starts:
        for variant in _told_of(reporting, variants):
            events.emit(reporting.verb, "started", variant, **stage.parameters(config, variant))
    outcome = stage.run(config, workspace, events, variants)
    seconds = round(time.monotonic() - start, 3)
    for variant in _told_of(reporting, variants) if reporting.completes else ():
        if outcome.refusal:
            events.failed(reporting.verb, variant, outcome.refusal, seconds)
        else:
            events.emit(reporting.verb, "completed", variant, **{"seconds": seconds, **_short(outcome.summary)})
    return outcome


def tell_failure(
    name: str, events: Events, variants: tuple[str, ...], error: BaseException | str, seconds: float
) -> None:
    """Send the failure event of a stage, once for each variant that it was about."""
    reporting = REPORTING[name]
    for variant in _told_of(reporting, variants) if reporting.verb else ():
        events.failed(reporting.verb, variant, error, seconds)


def failure_of(name: str, variants: tuple[str, ...], error: BaseException, rank: int = 0, size: int = 1) -> dict:
    """Return what the process that started a stage tells of its failure, as plain data.

    Args:
        rank: of the process that failed, if a stage has several.
        size: how many processes it has.
    """
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    place = f"process {rank} of {size}: " if kind and rank else ""
    what = " ".join((REPORTING[name].verb or name, *variants))
    return {
        "type": type(error).__name__,
        "message": f"{place}{one_line(error)}",
        "told": f"{what}: {place}{kind}{one_line(error)}",
        "exit_code": error.exit_code if isinstance(error, UserError) else 1,
        "rank": rank,
    }


def _told_of(reporting: Reporting, variants: tuple[str, ...]) -> tuple[str | None, ...]:
    return variants if reporting.verb == "quantize" else (None,)


def _short(summary: dict) -> dict:
    """Return the part of a summary that belongs in an event: numbers and short texts, not tables."""
    return {k: v for k, v in summary.items() if isinstance(v, (int, float, str, bool))}
