"""One verb each, all with the same signature.

A stage is a module with

    parameters(config, variant)                     what its start event tells
    depends(config, workspace, variants)            plain data; the same data, the same result
    run(config, workspace, events, variants)        does it, and returns an `Outcome`

It reads what earlier stages left in the workspace, writes under a temporary name,
renames, and says what it made. It runs in a process of its own (`pipeline.workflow.stage_process`).
Heavy libraries are imported inside `run`, so that asking what a stage depends on is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What a stage made: files or whole folders in the workspace, and its figures as plain data."""

    outputs: tuple[Path, ...] = ()
    summary: dict = field(default_factory=dict)
    refusal: UserError | None = None  # why what was made is not taken; the stage's end is then a failure in the events


@dataclass(frozen=True)
class Step:
    """How a stage appears in the events: as which verb, and which of its events it sends itself."""

    verb: str | None
    starts: bool = True
    completes: bool = True


STEPS = {
    "train": Step("train"),
    "merge": Step("merge"),
    "evaluate": Step("evaluate"),
    "compare_published": Step(
        "evaluate", starts=False, completes=False
    ),  # with the model that a repository has; retraining
    "quantize": Step("quantize", completes=False),  # writes the files of all variants ...
    "measure_variant": Step("quantize", starts=False),  # ... of which each is then measured and let in
    "render": Step(None, starts=False, completes=False),
    "publish": Step("publish"),
}
