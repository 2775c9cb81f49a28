"""One step of a run at a time, in a process of its own, and the ledger of what is done."""

from __future__ import annotations

import contextlib
import time

from pipeline.config.schema import Config
from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.system.command_names import command
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.tracking.forwarder import Forwarder
from pipeline.tracking.trackers import opener
from pipeline.training.accelerate_launch import Launch
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.stage_process import run_stage
from pipeline.workflow.stages import (
    STEPS,
    compare_published,
    evaluate,
    measure_variant,
    merge,
    publish,
    quantize,
    render,
    train,
)
from pipeline.workflow.workspace import Entry, Workspace

MODULES = {
    m.__name__.rpartition(".")[2]: m
    for m in (train, merge, evaluate, compare_published, quantize, measure_variant, render, publish)
}


def stages_before_variants(config: Config) -> tuple[str, ...]:
    """The stages that this configuration asks for, in order, up to the first variant."""
    asked = {"train": config.data, "merge": config.merges, "evaluate": config.evaluate}
    return tuple(stage for stage, wanted in asked.items() if wanted)


class Steps:
    """Does steps of a run, one process each, and keeps the ledger.

    A step is a stage for some variants. Its key in the ledger is the stage's name, or
    `quantize/VARIANT` for a variant that was admitted.
    """

    def __init__(self, config: Config, workspace: Workspace, reporter: Reporter, launch: Launch | None = None):
        self._config, self._workspace, self._reporter, self._launch = config, workspace, reporter, launch
        self._events = Events(workspace.events_path, config.name)
        self._failures: list[StageFailed] = []
        self._withheld: dict[str, StageFailed] = {}  # variants that missed their gate
        self._done: set[str] = set()
        self._written: set[str] = set()  # variants whose files this process has made
        self._forwarder = Forwarder(workspace.events_path, opener(config))

    def __enter__(self) -> Steps:
        self._reporter.begin(self._config, self._workspace)
        return self

    def __exit__(self, *exception) -> None:
        self._forwarder.close()
        self._reporter.end(self._forwarder.problem)

    def holds(self, stage: str, variants: tuple[str, ...] = ()) -> bool:
        """Is the step finished, and nothing it depends on changed?"""
        return self._workspace.holds(_key(stage, variants), self._fingerprint(stage, variants))

    def did(self, *keys: str) -> bool:
        """Was any of these steps done by this process?"""
        return not self._done.isdisjoint(keys)

    def recorded(self, key: str) -> bool:
        """Was the step ever finished, whatever has changed since?"""
        return key in self._workspace.ledger()

    def do(self, stage: str, variants: tuple[str, ...] = (), again: bool = False) -> None:
        """Do a step, unless it holds and is not to be done again.

        Raises:
            StageFailed: with the stage's own line.
        """
        key = _key(stage, variants)
        depends_on = self._fingerprint(stage, variants)
        if not again and self._workspace.holds(key, depends_on):
            if key not in self._done:
                self._reporter.kept(key)
            return
        self._workspace.note(key)
        self._reporter.started(key)
        start = time.time()
        try:
            report = run_stage(
                stage,
                STEPS[stage].verb,
                variants,
                self._workspace,
                self._events,
                self._reporter,
                self._tick,
                self._launch if stage == "train" else None,
            )
        except BaseException:
            self._reporter.failed(key)
            raise
        entry = Entry(
            fingerprint=depends_on,
            outputs=self._workspace.digests(report.outputs),
            summary=report.summary,
            finished=start + report.seconds,
            seconds=round(report.seconds, 3),
        )
        self._workspace.record(key, entry)
        self._done.add(key)
        self._reporter.finished(key, entry)
        if report.interrupted:
            raise Interrupted

    def try_admit(self, variant: str) -> bool:
        """Measure a variant, and let it in unless it misses its gate; True if it is in.

        Its failure keeps nothing else back.
        """
        if variant not in self._written and not self.holds("measure_variant", (variant,)):
            return False  # its files could not be written, which has been told
        try:
            self.do("measure_variant", (variant,))
        except StageFailed as failure:
            self._failures.append(failure)
            return False
        return self._is_in(variant)

    def try_publish(self, variants: tuple[str, ...]) -> None:
        """Publish what there is so far; if the Hub does not take it now, the last publish will tell."""
        with contextlib.suppress(StageFailed):
            self.do("publish", variants)

    def write_variants(self, variants: tuple[str, ...]) -> None:
        """The one pass that writes the files of these variants."""
        if not variants:
            return
        key = f"quantize ({', '.join(variants)})"
        self._reporter.started(key)
        try:
            report = run_stage(
                "quantize", "quantize", variants, self._workspace, self._events, self._reporter, self._tick
            )
        except StageFailed as failure:
            self._reporter.failed(key)
            self._failures.append(failure)
            return
        self._written.update(report.summary["made"])
        for name, reason in report.summary["refused"].items():
            self._failures.append(StageFailed(f"{name}: {reason}", 2, ""))
        if report.summary["made"]:
            self._reporter.wrote(key, report.seconds)
        else:
            self._reporter.failed(key)

    def admitted(self, variants: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these variants that are in the release."""
        return tuple(v for v in self.judged(variants) if self._is_in(v))

    def judged(self, variants: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these variants that were let in or withheld, and of which nothing has changed since."""
        return tuple(v for v in variants if self.holds("measure_variant", (v,)))

    def would_lose(self, variants: tuple[str, ...]) -> bool:
        """Would publishing now take one of these out of the release that is only to be judged anew?"""
        waiting = self._written.difference(self.judged(variants))
        return any(quantize.is_released(self._workspace, variant) for variant in waiting)

    def withdraw_documents(self) -> None:
        """Leave no documents of an earlier release where nothing of it is left."""
        render.withdraw(self._config, self._workspace)

    def require(self, stage: str) -> None:
        """Raise where a step that `stage` builds on is missing or out of date."""
        stages = stages_before_variants(self._config)
        for needed in stages[: stages.index(stage)] if stage in stages else stages:
            if not self.holds(needed):
                again = command(needed, "CONFIG")
                raise UserError(f"{stage}: {needed} is not done, or its inputs changed; run: {again}")

    def require_variant(self, variant: str) -> None:
        """Raise where a variant that the configuration asks for is missing or out of date."""
        if not self.holds("measure_variant", (variant,)):
            again = command("quantize", "CONFIG")
            raise UserError(f"publish: {variant} is not made, or its settings or libraries changed; run: {again}")

    def withheld(self) -> dict[str, StageFailed]:
        """The variants that were not let in since they missed their gate, and the line that says so."""
        return dict(self._withheld)

    def raise_failures(self, withheld: bool = True) -> None:
        """Tell at the end what failed on the way.

        Args:
            withheld: is it a failure that a variant missed its gate?
        """
        failures = self._failures + (list(self._withheld.values()) if withheld else [])
        if len(failures) == 1:
            raise failures[0]
        if failures:
            told = "; ".join(str(failure) for failure in failures)
            raise StageFailed(told, max(f.exit_code for f in failures), self._workspace.logs)

    def _is_in(self, variant: str) -> bool:
        """Is a variant that was judged in the release? What keeps it out is told at the end."""
        reason = self._workspace.ledger()[_key("measure_variant", (variant,))].summary.get("withheld")
        if reason:
            self._withheld[variant] = StageFailed(f"quantize {variant}: {reason}", 2, "")
        return reason is None

    def _tick(self) -> None:
        self._forwarder.forward()
        self._reporter.tick()

    def _fingerprint(self, stage: str, variants: tuple[str, ...]) -> str:
        return fingerprint(MODULES[stage].depends(self._config, self._workspace, variants))


def _key(stage: str, variants: tuple[str, ...]) -> str:
    return f"quantize/{variants[0]}" if stage == "measure_variant" else stage
