"""Reports of a run to people. The base class is silent; `pipeline.cli.terminal` prints."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.workflow.workspace import Entry, Workspace


class Reporter:
    """The receiver of a run's reports, called from one thread."""

    def begin(self, config: Config, workspace: Workspace) -> None:
        """Report that a run starts."""

    def kept(self, step: str) -> None:
        """Report that a step was finished before and still holds."""

    def started(self, step: str) -> None:
        """Report that a step starts."""

    def progress(self, done: int, total: int, what: str) -> None:
        """Report that the running step has done `done` of `total`, and what it is doing."""

    def show(self, lines: list[str]) -> None:
        """Show lines of the running step, such as samples of the training data."""

    def tick(self) -> None:
        """Redraw; called a few times a second while a step runs."""

    def wrote(self, step: str, seconds: float) -> None:
        """Report that the variants' files are written; each is still to be measured."""

    def finished(self, step: str, entry: Entry) -> None:
        """Report that a step is finished."""

    def failed(self, step: str) -> None:
        """Report that a step failed or was stopped; the reason comes as an exception."""

    def end(self, tracker_problem: str | None) -> None:
        """Report that the run is over, whatever its outcome."""
