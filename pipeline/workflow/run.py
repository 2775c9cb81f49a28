"""The order of the stages of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.training.accelerate_launch import Launch
from pipeline.workflow.preflight import preflight
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.runner import Steps, stages_before_variants
from pipeline.workflow.stages import publish
from pipeline.workflow.workspace import HIDDEN, Workspace


def run(
    config: Config,
    root: str | Path = "runs",
    fresh: bool = False,
    reporter: Reporter | None = None,
    output: str | Path | None = None,
    publish_again: bool = False,
    launch: Launch | None = None,
    begin: Callable[[], None] = lambda: None,
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
        begin: done before the first stage, when nothing was found that keeps the run from beginning.

    Returns:
        The run's workspace; `workspace.release` is the result.

    Raises:
        UserError: in one line, before any work where that is possible.
        StageFailed: where a stage failed; running again goes on from there.
    """
    preflight(config, launch=launch)
    variants = tuple(spec.name for spec in config.quantize.variants)
    published = config.publish.repo is not None
    reporter = reporter or Reporter()
    with (
        _claimed(config, root, output, fresh) as workspace,
        Steps(config, workspace, reporter, launch) as steps,
    ):
        begin()
        for stage in stages_before_variants(config):
            steps.do(stage)
        ready = steps.admitted(variants)
        per_stage = published and config.publish.commits == "per_stage" and not config.publish.create_pr
        has_news = steps.did("train", "merge", "evaluate") or not steps.recorded("publish")
        if per_stage and config.merges and has_news:
            steps.try_publish(ready)
        steps.write_variants(tuple(v for v in variants if v not in steps.judged(variants)))
        for variant in variants:
            is_new = steps.try_admit(variant) and steps.did(f"quantize/{variant}")
            if per_stage and is_new and not steps.would_lose(variants):
                steps.try_publish(steps.admitted(variants))
        if not config.merges and not steps.admitted(variants):
            _leave_no_documents(steps, variants)
            if published and steps.withheld():
                reporter.show(publish.still_there(config, steps.withheld()))
            steps.raise_failures()
        again = published and publish_again and not steps.did("publish")
        steps.do("publish" if published else "render", steps.admitted(variants), again)
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
            steps.write_variants(tuple(v for v in variants if v not in steps.judged(variants)))
            for variant in variants:
                steps.try_admit(variant)
            if config.merges or steps.admitted(variants):
                steps.do("render", steps.admitted(variants))
            else:
                _leave_no_documents(steps, variants)
        elif stage == "publish":
            for variant in variants:
                steps.require_variant(variant)
            # Again, for the repository may have changed, which only the Hub knows.
            steps.do("publish", steps.admitted(variants), again=True)
        else:
            steps.do(stage)
        steps.raise_failures()
    return workspace


def _leave_no_documents(steps: Steps, variants: tuple[str, ...]) -> None:
    """Where all that there was is withheld now, nothing is left that a card could tell of."""
    if set(steps.withheld()) == set(variants):
        steps.withdraw_documents()


_WANTED = {"train": "data", "merge": "data and no merge.adapter", "evaluate": "evaluate"}


@contextlib.contextmanager
def _claimed(config: Config, root: str | Path, output: str | Path | None, fresh: bool = False) -> Iterator[Workspace]:
    """The run's workspace, locked: a folder of its name under `root`, or hidden inside `output`."""
    folder = Path(root) / config.name if output is None else Path(output) / HIDDEN
    if output is not None:
        there = folder.parent
        if there.exists() and not folder.is_dir() and (not there.is_dir() or any(there.iterdir())):
            raise WorkspaceError(f"{there}: has other things in it; choose a new folder")
    with Workspace.claim(folder, config, fresh) as workspace:
        yield workspace
