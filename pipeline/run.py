"""The order of the stages, and which of them a run can skip."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline import data, live, models
from pipeline.config import Config
from pipeline.errors import ConfigError, Interrupted, StageFailed, UserError, WorkspaceError
from pipeline.events import Events
from pipeline.files import fingerprint
from pipeline.forwarding import Forwarder
from pipeline.launch import Launch, share
from pipeline.process import run_stage
from pipeline.reporter import Reporter
from pipeline.stages import STEPS, admit, compare, document, evaluate, merge, publish, quantize, train
from pipeline.trackers import opener
from pipeline.workspace import HIDDEN, Entry, Workspace

MODULES = {
    m.__name__.rpartition(".")[2]: m for m in (train, merge, evaluate, compare, quantize, admit, document, publish)
}


def run(
    config: Config,
    root: str | Path = "runs",
    fresh: bool = False,
    reporter: Reporter | None = None,
    output: str | Path | None = None,
    publish_again: bool = False,
    launch: Launch | None = None,
) -> Workspace:
    """The whole job, from what the configuration brings to a release; what is finished already is kept.

    With `data` that is training, merging, measuring and quantizing; with `merge.adapter` the same
    without training; with neither, the model is quantized as it is.

    Args:
        root: folder under which the run's folder lies.
        fresh: remove what an earlier run of this name left.
        output: folder that becomes the release itself; by default `release/` in the run's folder.
        publish_again: compare with the repository also where this release was published before.
        launch: train in several processes; by default in one.

    Returns:
        The run's workspace; `workspace.release` is the result.

    Raises:
        UserError: in one line, before any work where that is possible.
        StageFailed: where a stage failed; running again goes on from there.
    """
    preflight(config, launch=launch)
    variants = tuple(spec.name for spec in config.quantize.variants)
    published = config.publish.repo is not None
    with (
        _claimed(config, root, output, fresh) as workspace,
        Steps(config, workspace, reporter or Reporter(), launch) as steps,
    ):
        for stage in stages_before_variants(config):
            steps.do(stage)
        ready = steps.admitted(variants)
        per_stage = published and config.publish.commits == "per_stage" and not config.publish.create_pr
        has_news = steps.did("train", "merge", "evaluate") or not steps.recorded("publish")
        if per_stage and config.merges and has_news:
            steps.try_publish(ready)
        steps.write_variants(tuple(v for v in variants if v not in ready))
        for variant in variants:
            if steps.try_admit(variant) and per_stage and steps.did(f"quantize/{variant}"):
                steps.try_publish(steps.admitted(variants))
        if not config.merges and not steps.admitted(variants):
            steps.raise_failures()  # there is nothing that a card could tell of
        again = published and publish_again and not steps.did("publish")
        steps.do("publish" if published else "document", steps.admitted(variants), again)
        steps.raise_failures()
    return workspace


def run_one(
    config: Config,
    stage: str,
    root: str | Path = "runs",
    reporter: Reporter | None = None,
    output: str | Path | None = None,
    launch: Launch | None = None,
) -> Workspace:
    """One verb of a run alone, and nothing before it: `train`, `merge`, `evaluate`, `quantize` or `publish`."""
    preflight(config, stage != "publish", stage == "train", stage == "publish", launch)
    if stage == "publish" and config.publish.repo is None:
        raise ConfigError("publish.repo: not set, so there is nowhere to publish to; use --repo USER/NAME")
    if stage != "publish" and stage not in (*stages_before_variants(config), "quantize"):
        raise ConfigError(f"{stage}: not a part of this run; its configuration has no {_WANTED[stage]}")
    variants = tuple(spec.name for spec in config.quantize.variants)
    with (
        _claimed(config, root, output) as workspace,
        Steps(config, workspace, reporter or Reporter(), launch) as steps,
    ):
        steps.require(stage)
        if stage == "quantize":
            steps.write_variants(tuple(v for v in variants if not steps.holds("admit", (v,))))
            for variant in variants:
                steps.try_admit(variant)
            steps.do("document", steps.admitted(variants))
        elif stage == "publish":
            for variant in variants:
                steps.require_variant(variant)
            steps.do("publish", variants, again=True)  # the repository may have changed, which only the Hub knows
        else:
            steps.do(stage)
        steps.raise_failures()
    return workspace


_WANTED = {"train": "data", "merge": "data and no merge.adapter", "evaluate": "evaluate"}


def stages_before_variants(config: Config) -> tuple[str, ...]:
    """The stages that this configuration asks for, in order, up to the first variant."""
    asked = {"train": config.data, "merge": config.merges, "evaluate": config.evaluate}
    return tuple(stage for stage, wanted in asked.items() if wanted)


@contextlib.contextmanager
def _claimed(config: Config, root: str | Path, output: str | Path | None, fresh: bool = False) -> Iterator[Workspace]:
    """The run's workspace, locked: a folder of its name under `root`, or hidden inside `output`."""
    folder = Path(root) / config.name if output is None else Path(output) / HIDDEN
    if output is not None:
        there = folder.parent
        if there.exists() and not folder.is_dir() and (not there.is_dir() or any(there.iterdir())):
            raise WorkspaceError(f"{there}: has other things in it; choose a new folder")
    with Workspace.claim(folder, config, fresh) as workspace:
        live.forget(workspace)  # a retraining that was stopped binds retrainings alone
        yield workspace


def preflight(
    config: Config,
    need_inputs: bool = True,
    need_data: bool = True,
    need_hub: bool = True,
    launch: Launch | None = None,
) -> None:
    """Everything that can be found wrong before any work.

    Raises:
        UserError: naming it.
    """
    from pipeline.trackers.trackio import check as check_tracking

    if launch:
        if config.data is None:
            raise ConfigError("--accelerate: this configuration has no data, so there is nothing to train")
        share(config, launch.processes)
    if need_inputs:
        models.check_source(config.model)
    if need_inputs:
        quantize.check_extras(config)
    if need_inputs and config.merge.adapter:
        models.check_adapter(config.merge.adapter)
    if config.data and need_data:
        data.check_source(config.data)
    if need_inputs and config.evaluate:
        data.general_text(config.evaluate.general)
        _check_device(config.evaluate.device)
    check_tracking(config.track)
    if config.data and config.train.method == "lora" and config.merge.base == "nf4":
        raise ConfigError("merge.base nf4: train.method lora never saw NF4 weights; use auto or bf16")
    if need_hub and config.publish.repo:
        from pipeline.hub import check_access, check_destination

        for repo in (config.publish.repo, *config.publish.mirrors.values()):
            check_access(repo, config.publish.create_pr)
        check_destination(config.publish.repo, config.name)


def _check_device(name: str) -> None:
    """Raise where a device that was named is not there; `auto` and `cpu` are, and need no heavy import to be found."""
    if name not in ("auto", "cpu"):
        from pipeline.loading import device_named

        device_named(name)


class Steps:
    """Does steps of a run, one process each, and keeps the ledger.

    A step is a stage for some variants. Its key in the ledger is the stage's name, or
    `quantize/VARIANT` for a variant that was admitted.
    """

    def __init__(self, config: Config, workspace: Workspace, reporter: Reporter, launch: Launch | None = None):
        self._config, self._workspace, self._reporter, self._launch = config, workspace, reporter, launch
        self._events = Events(workspace.events_path, config.name)
        self._failures: list[StageFailed] = []
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
        """Let a variant in, measured; True if it is in. Its failure keeps nothing else back."""
        if variant not in self._written and not self.holds("admit", (variant,)):
            return False  # its files could not be written, which has been told
        try:
            self.do("admit", (variant,))
        except StageFailed as failure:
            self._failures.append(failure)
            return False
        return True

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
        return tuple(v for v in variants if self.holds("admit", (v,)))

    def require(self, stage: str) -> None:
        """Raise where a step that `stage` builds on is missing or out of date."""
        stages = stages_before_variants(self._config)
        for needed in stages[: stages.index(stage)] if stage in stages else stages:
            if not self.holds(needed):
                raise UserError(f"{stage}: {needed} is not done, or its inputs changed; run: tunepress {needed} CONFIG")

    def require_variant(self, variant: str) -> None:
        """Raise where a variant that the configuration asks for is missing or out of date."""
        if not self.holds("admit", (variant,)):
            raise UserError(
                f"publish: {variant} is not made, or its settings or libraries changed; run: tunepress quantize CONFIG"
            )

    def raise_failures(self) -> None:
        """Tell at the end what failed on the way."""
        if len(self._failures) == 1:
            raise self._failures[0]
        if self._failures:
            told = "; ".join(str(failure) for failure in self._failures)
            raise StageFailed(told, max(f.exit_code for f in self._failures), self._workspace.logs)

    def _tick(self) -> None:
        self._forwarder.forward()
        self._reporter.tick()

    def _fingerprint(self, stage: str, variants: tuple[str, ...]) -> str:
        return fingerprint(MODULES[stage].depends(self._config, self._workspace, variants))


def _key(stage: str, variants: tuple[str, ...]) -> str:
    return f"quantize/{variants[0]}" if stage == "admit" else stage
