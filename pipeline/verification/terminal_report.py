"""The report of a verification on a terminal: one line for each finding, and a progress bar."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.verification.findings import Finding, Verdict, Verification

_MARKS = {
    Verdict.right: "[green]+[/]",
    Verdict.wrong: "[red]x[/]",
    Verdict.outdated: "[red]![/]",
    Verdict.unknown: "[yellow]?[/]",
}


class Report:
    """A report on `console`: findings, and on a terminal also a progress bar while it is open."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("reading", total=None)

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def progress(self, done: int, total: int, text: str) -> None:
        """Show the progress of the current step."""
        known = {"completed": done, "total": total} if total > 1 else {"total": None}
        self._bar.update(self._task, description=escape(text), **known)

    def found(self, finding: Finding) -> None:
        """Print a finding."""
        told = f"{finding.check:<9} {finding.subject:<34} {finding.message}"
        self._console.print(f"{_MARKS[finding.verdict]} {escape(told)}")

    def end(self, verification: Verification) -> None:
        """Print the result of all findings."""
        number, checked = len(verification.defects), len(verification.findings)
        at = f" at {verification.revision[:12]}" if verification.revision else ""
        release = f"[bold]{escape(verification.release)}[/]{at}"
        if number:
            self._console.print(f"\n{release}: [red]{number} defect{'s' if number > 1 else ''}[/] in {checked} lines")
            return
        left = sum(finding.verdict is Verdict.unknown for finding in verification.findings)
        beside = f", {left} checks were not possible" if left else ""
        self._console.print(f"\n{release}: [green]untouched[/]{beside}")
