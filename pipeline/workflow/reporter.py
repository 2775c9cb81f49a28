"""What a run tells whoever watches. The base class keeps silent; `pipeline.cli.terminal` speaks."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.workflow.workspace import Entry, Workspace


class Reporter:
    """Called by `pipeline.workflow.run`, from one thread."""

    def begin(self, config: Config, workspace: Workspace) -> None:
        """A run starts."""

    def kept(self, step: str) -> None:
        """A step was finished before and still holds."""

    def started(self, step: str) -> None:
        """A step starts."""

    def progress(self, done: int, total: int, what: str) -> None:
        """The running step has done `done` of `total`; `what` it is doing."""

    def show(self, lines: list[str]) -> None:
        """The running step has something to show, such as the data it is about to train on."""

    def tick(self) -> None:
        """A few times a second while a step runs."""

    def wrote(self, step: str, seconds: float) -> None:
        """The variants' files are written; each is still to be measured."""

    def finished(self, step: str, entry: Entry) -> None:
        """A step is finished."""

    def failed(self, step: str) -> None:
        """A step failed or was stopped; the reason comes as an exception."""

    def end(self, tracker_problem: str | None) -> None:
        """The run is over, whatever its outcome."""
