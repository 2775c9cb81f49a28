"""The progress of a run on a terminal: one line for each step, and a bar with the time left.

Without a terminal (CI, a pipe) lines of progress replace the bar.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.config.catalog import LLAMA_CPP, TRANSFORMERS, VARIANTS
from pipeline.config.schema import Config
from pipeline.evaluation.model_result import GENERAL, HELD_OUT, TEXTS, ModelResult, Quality, Speed
from pipeline.evaluation.results import BASE, MERGED, Results
from pipeline.system.command_names import command
from pipeline.system.text_format import clock, size
from pipeline.tracking.events import alert_level
from pipeline.tracking.trackers import tracker
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.run_state import RunState
from pipeline.workflow.workspace import Entry, Workspace

COLUMN_SPACE = 2  # between two columns of a table
QUIET_SECONDS = 30.0  # between progress lines without a terminal


class TerminalReporter(Reporter):
    """Progress on a console, which writes to standard error if the output is JSON."""

    def __init__(self, console: Console):
        self.console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._tracker = "The tracker"
        self._phase = ""
        self._start = 0.0
        self._last_line = 0.0

    def begin(self, config: Config, workspace: Workspace) -> None:
        """Print the run's name, inputs and folder."""
        self._tracker = tracker(config.track.tracker).LABEL
        added = config.data.named if config.data else config.merge.adapter
        made_of = "  +  ".join(filter(None, (config.model.source, added)))
        self.console.print(f"[bold]{escape(config.name)}[/]  {escape(made_of)}")
        self.console.print(f"[dim]{escape(str(workspace.folder))}[/]")

    def kept(self, step: str) -> None:
        """Print a step that was finished earlier."""
        self.console.print(f"[dim]= {step:<24} done before[/]")

    def started(self, step: str) -> None:
        """Show that a step starts."""
        self._start = self._last_line = time.monotonic()
        self._phase = ""
        if not self.console.is_terminal:
            self.console.print(f"> {step}")
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn(f"{step:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()

    def progress(self, done: int, total: int, what: str) -> None:
        """Show the progress of the current step."""
        phase = "".join(c for c in what if not c.isdigit())
        if self._bar is not None:
            if phase.split(",")[0] != self._phase:  # another phase has its own time left
                self._bar.reset(self._task)
            self._bar.update(self._task, completed=done, total=total if total > 1 else None, description=escape(what))
        elif not self.console.is_terminal and time.monotonic() - self._last_line > QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"  {escape(what)} ({done}/{total})" if total > 1 else f"  {escape(what)}")
        self._phase = phase.split(",")[0]

    def show(self, lines: list[str]) -> None:
        """Print lines below the current step."""
        for line in lines:
            self.console.print(f"  [dim]{escape(line)}[/]")

    def wrote(self, step: str, seconds: float) -> None:
        """Print a step that has written files which are not measured yet."""
        self._done(step, seconds, "files written")

    def finished(self, step: str, entry: Entry) -> None:
        """Print a finished step with its figures."""
        self._done(step, entry.seconds, _tell(entry.summary), "withheld" not in entry.summary)

    def failed(self, step: str) -> None:
        """Print a failed step."""
        self._stop_bar()
        self.console.print(f"[red]x[/] {step:<24} {clock(time.monotonic() - self._start)}")

    def end(self, tracker_problem: str | None) -> None:
        """Print the tracker's problem, if it missed records."""
        self._stop_bar()
        if tracker_problem:
            self.console.print(
                f"[yellow]![/] {self._tracker}: missed records, which the next run sends ({escape(tracker_problem)}). "
                f"Try: {command('sync', 'RUN')}"
            )

    def _done(self, step: str, seconds: float, text: str, well: bool = True) -> None:
        self._stop_bar()
        mark = "[green]+[/]" if well else "[red]x[/]"
        self.console.print(f"{mark} {step:<24} {clock(seconds):>7}  {escape(text)}")

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def summary(console: Console, config: Config, workspace: Workspace) -> None:
    """Print the figures of a finished run and the next commands."""
    results = Results.read(workspace.results_path)
    there = [v for v in VARIANTS if v in results.variants and (workspace.release / VARIANTS[v].folder).is_dir()]
    shown = [v for v in there if not ((gate := results[v].gate) and gate.withheld)]
    titles = ("", "size", "held-out ppl", "general ppl", "KL", "decode", "memory")
    rows = [(name, *_figures(results[name])) for name in (BASE, MERGED, *shown) if name in results.models]
    measured = [column for column in zip(titles, *rows, strict=True) if set(column[1:]) != {"-"}]
    for table in _tables(measured if rows else [], console.width):
        console.print(table)
    console.print(f"[dim]{_how_measured(results)}[/]")
    console.print(f"\nRelease    {escape(str(workspace.release))}")
    chosen = [v for v in shown if VARIANTS[v].engine == TRANSFORMERS] or shown
    option = ("--variant", chosen[-1]) if chosen else ()
    run = workspace.release if workspace.release in workspace.folder.parents else workspace.folder
    console.print(f"Chat       {escape(command('chat', run, *option))}")
    console.print(f"Dashboard  {escape(tracker(config.track.tracker).dashboard(config))}")
    if config.publish.repo is None:
        console.print(f"Publish    {escape(command('publish', run, '--repo', 'USER/NAME'))}")
    else:
        from huggingface_hub import constants

        console.print(f"Published  {constants.ENDPOINT}/{config.publish.repo}")


def _tables(columns: Sequence[tuple[str, ...]], width: int) -> list[Table]:
    """Return the columns as tables that fit in `width` characters, because a cut figure is no figure.

    Args:
        columns: title and cells of each. The first one has the names, and is repeated.
    """
    groups: list[list[tuple[str, ...]]] = []
    left = 0
    for column in columns[1:]:
        needed = max(map(len, column)) + COLUMN_SPACE
        if not groups or needed > left:
            groups.append([columns[0]])
            left = width - max(map(len, columns[0])) - 2 * COLUMN_SPACE
        groups[-1].append(column)
        left -= needed
    return [_table(group) for group in groups]


def _table(columns: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for title, *_ in columns:
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*row)
    return table


def _how_measured(results: Results) -> str:
    """Return the meaning of the measured columns."""
    models = results.models.values()
    quality = next((model.quality for model in models if model.quality), None)
    if not quality:
        return f"nothing was measured. Try: {command('quantize', '--measure')}"
    counted = " and ".join(f"{q.tokens} {TEXTS[text]}" for text, q in quality.items())
    text = TEXTS[HELD_OUT if HELD_OUT in quality else GENERAL]
    others = ", GGUF by llama.cpp" if any(LLAMA_CPP in model.speed for model in models) else ""
    return (
        f"ppl: perplexity, ± one standard error, on {counted} tokens. KL: to the full-precision model, {text} text, in "
        f"nats a token. decode: batch 1, variants by pipeline.load{others}. memory: of a fresh process that loads and "
        "generates, libraries included."
    )


def _figures(result: ModelResult) -> list[str]:
    speed = result.fastest or Speed()
    compared = next((q.kl for q in result.quality.values() if q.kl), None)  # held-out text comes first

    def perplexity(quality: Quality) -> str:
        found = quality.perplexity
        if not found:
            return "-"
        return f"{found.value:.2f}" + (f" ± {found.stderr:.2f}" if math.isfinite(found.stderr) else "")

    return [
        size(result.size_bytes) if result.size_bytes is not None else "-",
        perplexity(result.on(HELD_OUT)),
        perplexity(result.on(GENERAL)),
        f"{compared.value:.4f}" if compared else "-",
        f"{speed.decode_tokens_per_second:.1f} tok/s" if speed.decode_tokens_per_second else "-",
        size(speed.peak_memory_bytes) if speed.peak_memory_bytes else "-",
    ]


def _tell(figures: dict) -> str:
    """Return the figures of a step in a few words."""
    if "tokens" in figures:
        return f"{figures['tokens']:,} tokens of text"
    if distilled := [key.removesuffix("_kl_after") for key in figures if key.endswith("_kl_after")]:
        kl = {name: [figures[f"{name}_kl_{when}"] for when in ("before", "after")] for name in distilled}
        told = (f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in kl.items())
        return f"KL divergence on calibration text: {', '.join(told)}"
    if "held_out_loss" in figures:
        return f"{figures['steps']} steps, held-out loss {figures['held_out_loss'] or float('nan'):.3f}"
    if "merged_held_out_perplexity" in figures:
        base, merged = (figures[f"{m}_held_out_perplexity"] for m in ("base", "merged"))
        return f"held-out perplexity {base:.2f} -> {merged:.2f}"
    if "withheld" in figures:
        return figures["withheld"]
    if "made_again" in figures:
        return f"made again: {figures['made_again']}"
    if "missed" in figures:
        return f"{size(figures['bytes_after'])}, misses its gate: {figures['missed']}"
    if "bytes_after" in figures:
        return ", ".join([size(figures["bytes_after"]), *_perplexities(figures)])
    if "files_sent" in figures:
        sent = size(figures["bytes_sent"])
        sent = f"{sent} in them, of which Xet sent what the Hub lacked" if figures.get("by_xet") else f"{sent} sent"
        changed = f"{figures['files_sent']} files changed, {sent}"
        removed = f"removed {figures['removed']}" if "removed" in figures else ""
        parts = [changed if figures["files_sent"] else "nothing to send", removed, figures["url"]]
        return ", ".join(filter(None, parts))
    if "documents" in figures:
        return f"removed {figures['removed']}" if "removed" in figures else ""
    if "merged_general_perplexity" in figures:
        base, merged = (figures[f"{m}_general_perplexity"] for m in ("base", "merged"))
        return f"general perplexity {base:.2f} -> {merged:.2f}"
    if "base_general_perplexity" in figures:
        return f"general perplexity {figures['base_general_perplexity']:.2f}"
    if "variants" in figures:
        return f"into the {figures['base']} base, {figures['variants']} written in the same pass"
    return f"into the {figures['base']} base" if "base" in figures else ""


def _perplexities(figures: dict) -> list[str]:
    for text in ("held_out", "general"):
        if value := figures.get(f"{text}_perplexity"):
            return [f"{text.replace('_', '-')} perplexity {value:.2f}"]
    return []


def show_status(console: Console, state: RunState, workspace: Workspace, events: list[dict]) -> None:
    """Print the steps of a run and its last events."""
    table = Table(title=f"{workspace.folder}", title_justify="left")
    for column in ("step", "finished", "took", ""):
        table.add_column(column)
    ledger = workspace.ledger()
    for key, entry in ledger.items():
        told = "[yellow]its files changed or are gone[/]" if key in state.changed else escape(_tell(entry.summary))
        told = "removed" if key in state.removed else told
        told = "[green]runs again now[/]" if key in state.running else told
        finished = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.finished))
        table.add_row(key, finished, clock(entry.seconds), told)
    for key in state.running:
        if key not in ledger:
            table.add_row(key, "", clock(time.time() - state.running[key]), "[green]runs now[/]")
    for key in state.left:
        table.add_row(key, "", "", "stopped" if key in state.stopped else "not done yet")
    console.print(table)
    for event in events:
        when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        color = {"error": "red", "warn": "yellow"}.get(alert_level(event), "default")
        about = {k: v for k, v in event.items() if k not in ("time", "run", "event", "stage")}
        console.print(f"{when}  [{color}]{event['event']:<24}[/] {escape(_plain(about))}")


def _plain(fields: dict) -> str:
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items())
