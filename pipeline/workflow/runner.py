"""The runner: it does the steps of a run one after the other, and records them in the ledger."""

from __future__ import annotations

import contextlib
import time

from pipeline.config.schema import Config
from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.evaluation.overview import headline, side_by_side
from pipeline.evaluation.results import Results
from pipeline.system.command_names import command
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.tracking.forwarder import Forwarder
from pipeline.tracking.trackers import opener
from pipeline.training.accelerate_launch import Launch
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.stage_process import Report, StartStage, run_stage
from pipeline.workflow.stages import config_of, quantize, stage_named
from pipeline.workflow.workspace import Entry, Workspace


def stages_before_variants(config: Config) -> tuple[str, ...]:
    """Return the stages that this configuration asks for, in order, up to the first variant."""
    asked = {"train": config.data, "merge": config.merges, "evaluate": config.evaluate}
    return tuple(stage for stage, wanted in asked.items() if wanted)


def stages_for_variants(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the stages that prepare variants, in order, each with the names of those that need it."""
    quantize = config.quantize
    return {"allocate": quantize.targeted, "calibrate": quantize.calibrated, "distill": quantize.distilled}


class Runner:
    """The runner of a run's steps. A step that is finished and still valid is skipped.

    A step is a stage, or a stage for one variant. Its key in the ledger is the stage's name, or `quantize/VARIANT`.

    Args:
        launch: train in several processes; by default in one.
        start: the way to run a stage; by default in a process of its own.
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        reporter: Reporter,
        launch: Launch | None = None,
        start: StartStage = run_stage,
    ):
        self._config, self._workspace, self._reporter = config, workspace, reporter
        self._launch, self._start = launch, start
        self._events = Events(workspace.events_path, config.name)
        self._failures: list[StageFailed] = []
        self._withheld: dict[str, StageFailed] = {}  # variants that missed their gate
        self._done: set[str] = set()
        self._written: set[str] = set()  # variants whose files this process has written
        self._forwarder = Forwarder(workspace.events_path, opener(config))

    def __enter__(self) -> Runner:
        self._reporter.begin(self._config, self._workspace)
        return self

    def __exit__(self, *exception: object) -> None:
        self._forwarder.close()
        self._reporter.end(self._forwarder.problem)

    def holds(self, stage: str, variants: tuple[str, ...] = ()) -> bool:
        """Return True if the step is finished and its dependencies have not changed."""
        return self._workspace.holds(_key(stage, variants), self._fingerprint(stage, variants))

    def did(self, *keys: str) -> bool:
        """Return True if this process has done any of these steps."""
        return not self._done.isdisjoint(keys)

    def recorded(self, key: str) -> bool:
        """Return True if the step has ever finished, even if its dependencies changed later."""
        return key in self._workspace.ledger()

    def do(self, stage: str, variants: tuple[str, ...] = (), again: bool = False) -> None:
        """Do a step unless it is finished and still valid.

        Args:
            again: do it in any case.

        Raises:
            StageFailed: with the stage's own message.
        """
        key, depends_on = _key(stage, variants), self._fingerprint(stage, variants)
        if not again and self._workspace.holds(key, depends_on):
            if key not in self._done:
                self._reporter.kept(key)
            return
        self._reporter.started(key)
        start = time.time()
        self._workspace.note(key, started=start)
        try:
            report = self._run(stage, variants)
        except StageFailed:
            self._workspace.note(key, started=None)
            self._reporter.failed(key)
            raise
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

    def write_variants(self, variants: tuple[str, ...]) -> None:
        """Write the files of all variants that are not measured yet, in one pass; `raise_failures` raises failures."""
        missing = self._not_measured(variants)
        for stage, needing in stages_for_variants(self._config).items():
            if some := tuple(v for v in missing if v in needing):
                try:
                    self.do(stage, some)
                    missing = self._not_measured(missing)  # with settings that were measured before
                except StageFailed as failure:
                    self._failures.append(failure)
                    missing = tuple(v for v in missing if v not in some)
        if not missing:
            return
        key = f"quantize ({', '.join(missing)})"
        self._reporter.started(key)
        try:
            report = self._run("quantize", missing)
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

    def measure_variant(self, variant: str) -> bool:
        """Measure a variant, and release it unless it misses its gate; `raise_failures` raises failures.

        Returns:
            True if it was measured now and is in the release.
        """
        if variant not in self._written and not self.holds("measure_variant", (variant,)):
            return False  # its files could not be written, which is already a failure
        try:
            self.do("measure_variant", (variant,))
            while self._is_made_again(variant):
                self._written.discard(variant)
                self.write_variants((variant,))
                if variant not in self._written:
                    return False
                self.do("measure_variant", (variant,))
        except StageFailed as failure:
            self._failures.append(failure)
            return False
        return self._is_released(variant) and self.did(f"quantize/{variant}")

    def try_publish(self, variants: tuple[str, ...]) -> None:
        """Publish the present state; ignore a failure, because the last publish reports it.

        Nothing is published if that would remove a variant that awaits re-evaluation.
        """
        waiting = (v for v in self._written if not self.holds("measure_variant", (v,)))
        if any(quantize.is_released(self._workspace, variant) for variant in waiting):
            return
        with contextlib.suppress(StageFailed):
            self.do("publish", self.released(variants))

    def released(self, variants: tuple[str, ...]) -> tuple[str, ...]:
        """Return the variants that are in the release and whose dependencies have not changed."""
        return tuple(v for v in variants if self.holds("measure_variant", (v,)) and self._is_released(v))

    def withheld(self) -> dict[str, StageFailed]:
        """Return the variants that were withheld because they missed their gate, with the message of each."""
        return dict(self._withheld)

    def compare_models(self) -> None:
        """Send the figures of all models side by side, if they are new."""
        rows = side_by_side(Results.read(self._workspace.results_path))
        self._events.models(rows, headline(rows))

    def require(self, stage: str) -> None:
        """Raise UserError if a step before `stage` is missing or out of date."""
        stages = stages_before_variants(self._config)
        for needed in stages[: stages.index(stage)] if stage in stages else stages:
            if not self.holds(needed):
                again = command(needed, "CONFIG")
                raise UserError(f"{stage}: {needed} is not done, or its inputs changed. Try: {again}")

    def require_variant(self, variant: str) -> None:
        """Raise UserError if a variant is missing or out of date."""
        if not self.holds("measure_variant", (variant,)):
            again = command("quantize", "CONFIG")
            raise UserError(f"publish: {variant} is missing, or its settings or libraries changed. Try: {again}")

    def raise_failures(self, withheld: bool = True) -> None:
        """Raise the failures of variants, which did not stop the run.

        Args:
            withheld: also raise if a variant missed its gate.

        Raises:
            StageFailed: one error with the messages of all failures.
        """
        failures = self._failures + (list(self._withheld.values()) if withheld else [])
        if len(failures) == 1:
            raise failures[0]
        if failures:
            message = "; ".join(str(failure) for failure in failures)
            raise StageFailed(message, max(f.exit_code for f in failures), self._workspace.logs)

    def _run(self, stage: str, variants: tuple[str, ...]) -> Report:
        launch = self._launch if stage == "train" else None
        return self._start(stage, variants, self._workspace, self._events, self._reporter, self._tick, launch)

    def _not_measured(self, variants: tuple[str, ...]) -> tuple[str, ...]:
        """Return the variants that must be made: not measured yet, or to be made again with other settings."""
        return tuple(v for v in variants if not self.holds("measure_variant", (v,)))

    def _is_made_again(self, variant: str) -> bool:
        """Return True if the target of a variant led to other settings after its measurement."""
        return bool(self._workspace.ledger()[_key("measure_variant", (variant,))].summary.get("made_again"))

    def _is_released(self, variant: str) -> bool:
        """Return True if a measured variant is in the release; otherwise remember why it is withheld."""
        reason = self._workspace.ledger()[_key("measure_variant", (variant,))].summary.get("withheld")
        if reason:
            self._withheld[variant] = StageFailed(f"quantize {variant}: {reason}", 2, "")
        return reason is None

    def _tick(self) -> None:
        self._forwarder.forward()
        self._reporter.tick()

    def _fingerprint(self, stage: str, variants: tuple[str, ...]) -> str:
        config = config_of(stage, self._config, self._workspace)
        return fingerprint(stage_named(stage).depends(config, self._workspace, variants))


def _key(stage: str, variants: tuple[str, ...]) -> str:
    return f"quantize/{variants[0]}" if stage == "measure_variant" else stage
