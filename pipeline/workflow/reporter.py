"""Reports of a run to people; `pipeline.cli.terminal` prints them."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.workflow.workspace import Entry, Workspace


class Reporter:
    """A silent receiver of a run's reports. All calls come from one thread."""

    def begin(self, config: Config, workspace: Workspace) -> None:
        """Report that a run starts."""

    def kept(self, step: str) -> None:
        """Report that a finished step is still valid and is skipped."""

    def started(self, step: str) -> None:
        """Report that a step starts."""

    def progress(self, done: int, total: int, what: str) -> None:
        """Report that `done` of `total` is done, and the activity of the running step."""

    def show(self, lines: list[str]) -> None:
        """Show lines of the running step, such as samples of the training data."""

    def tick(self) -> None:
        """Redraw; called a few times a second while a step runs."""

    def wrote(self, step: str, seconds: float) -> None:
        """Report that the files of the variants are written; each is measured next."""

    def finished(self, step: str, entry: Entry) -> None:
        """Report that a step is finished."""

    def failed(self, step: str) -> None:
        """Report that a step failed or was stopped; an exception carries the reason."""

    def end(self, tracker_problem: str | None) -> None:
        """Report that the run has ended, with or without a failure."""
