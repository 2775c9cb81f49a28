"""A whole run from its first stage to its last, and single stages of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.publishing.removal import NO_REMOVAL, Removal
from pipeline.training.accelerate_launch import Launch
from pipeline.workflow.kept_variants import note_removal, with_kept_variants
from pipeline.workflow.preflight import preflight
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.runner import Runner, stages_before_variants
from pipeline.workflow.stage_process import StartStage, run_stage
from pipeline.workflow.stages import publish, render
from pipeline.workflow.workspace import HIDDEN, Workspace


def run(
    config: Config,
    root: str | Path = "runs",
    fresh: bool = False,
    reporter: Reporter | None = None,
    output: str | Path | None = None,
    publish_again: bool = False,
    launch: Launch | None = None,
    removal: Removal = NO_REMOVAL,
    begin: Callable[[], None] = lambda: None,
    start: StartStage = run_stage,
) -> Workspace:
    """Run every stage that the configuration asks for; skip stages that are finished and still valid.

    With `data`: train, merge, measure and quantize. With `merge.adapter`: the same without training.
    With neither: quantize the model as it is.

    Args:
        root: parent of the run's folder.
        fresh: remove the files of an earlier run of this name.
        output: folder that becomes the release; by default `release/` in the run's folder.
        publish_again: compare with the repository even if this release was published before.
        launch: train in several processes; by default in one.
        removal: variants of earlier releases to remove; all others stay.
        begin: called before the first stage, after all checks passed.
        start: the way to run a stage; by default in a process of its own.

    Returns:
        The run's workspace; `workspace.release` is the result.

    Raises:
        UserError: in one line, before the first stage if possible.
        StageFailed: if a stage failed; another run goes on with that stage.
    """
    reporter = reporter or Reporter()
    config, agreed = _next_release(config, root, output, removal, reporter, fresh)
    if not config.merges and not config.quantize.variants:
        raise ConfigError(
            "quantize.variants: names none, and nothing is trained or merged. Try: quantize.variants=int8"
        )
    preflight(config, launch=launch, removal=agreed)
    variants = tuple(spec.name for spec in config.quantize.variants)
    publishes = config.publish.repo is not None
    per_stage = publishes and config.publish.commits == "per_stage" and not config.publish.create_pr
    with (
        _claimed(config, root, output, fresh) as workspace,
        Runner(config, workspace, reporter, launch, start) as runner,
    ):
        note_removal(workspace, agreed)
        begin()

        # Train, merge, evaluate: as far as the configuration asks for it.
        for stage in stages_before_variants(config):
            runner.do(stage)

        # Publish the merged model.
        is_new_model = runner.did("train", "merge", "evaluate") or not runner.recorded("publish")
        if per_stage and config.merges and is_new_model:
            runner.try_publish(variants)

        # Quantize, measure and publish each variant.
        runner.write_variants(variants)
        for variant in variants:
            is_new = runner.measure_variant(variant)
            if per_stage and is_new:
                runner.try_publish(variants)

        runner.compare_models()

        # Publish the rest, or write the documents of a local release.
        released = runner.released(variants)
        if config.merges or released:
            again = publishes and (publish_again or removal != NO_REMOVAL) and not runner.did("publish")
            runner.do("publish" if publishes else "render", released, again)
        else:
            _withdraw_documents(config, workspace, runner, variants)
            if publishes and runner.withheld():
                reporter.show(publish.still_there(config, runner.withheld()))
        runner.raise_failures()
    return workspace


def run_one(
    config: Config,
    stage: str,
    root: str | Path = "runs",
    reporter: Reporter | None = None,
    output: str | Path | None = None,
    launch: Launch | None = None,
    removal: Removal = NO_REMOVAL,
    start: StartStage = run_stage,
) -> Workspace:
    """Run one verb alone: `train`, `merge`, `evaluate`, `quantize` or `publish`.

    Args:
        root, output, launch, removal, start: as in `run`.

    Raises:
        UserError: if the stage is not a part of this run, or an earlier stage is missing.
        StageFailed: if the stage failed.
    """
    reporter = reporter or Reporter()
    config, agreed = _next_release(config, root, output, removal, reporter)
    preflight(config, stage != "publish", stage == "train", stage == "publish", launch, agreed)
    if stage == "publish" and config.publish.repo is None:
        raise ConfigError("publish.repo: not set. Try: --repo USER/NAME")
    if stage != "publish" and stage not in (*stages_before_variants(config), "quantize"):
        raise ConfigError(f"{stage}: not a part of this run; its configuration has no {_REQUIRED[stage]}")
    variants = tuple(spec.name for spec in config.quantize.variants)
    with (
        _claimed(config, root, output) as workspace,
        Runner(config, workspace, reporter, launch, start) as runner,
    ):
        note_removal(workspace, agreed)
        runner.require(stage)
        if stage == "quantize":
            runner.write_variants(variants)
            for variant in variants:
                runner.measure_variant(variant)
            if config.merges or runner.released(variants):
                runner.do("render", runner.released(variants))
            else:
                _withdraw_documents(config, workspace, runner, variants)
        elif stage == "publish":
            for variant in variants:
                runner.require_variant(variant)
            # Always compare with the Hub, because the repository may have changed.
            runner.do("publish", runner.released(variants), again=True)
        else:
            runner.do(stage)
        runner.compare_models()
        runner.raise_failures()
    return workspace


_REQUIRED = {"train": "data", "merge": "data and no merge.adapter", "evaluate": "evaluate"}


def _withdraw_documents(config: Config, workspace: Workspace, runner: Runner, variants: tuple[str, ...]) -> None:
    """Remove our documents from a release if every variant is withheld."""
    if set(runner.withheld()) == set(variants):
        render.withdraw(config, workspace)


def _next_release(
    config: Config,
    root: str | Path,
    output: str | Path | None,
    removal: Removal,
    reporter: Reporter,
    fresh: bool = False,
) -> tuple[Config, Removal]:
    """Return the configuration with the variants that stay, and the agreed removals."""
    if fresh:
        return config, removal
    return with_kept_variants(config, Workspace(_folder(config, root, output)), removal, reporter.show)


def _folder(config: Config, root: str | Path, output: str | Path | None) -> Path:
    return Path(root) / config.name if output is None else Path(output) / HIDDEN


@contextlib.contextmanager
def _claimed(config: Config, root: str | Path, output: str | Path | None, fresh: bool = False) -> Iterator[Workspace]:
    """Yield the locked workspace of the run: a folder of its name under `root`, or hidden inside `output`."""
    folder = _folder(config, root, output)
    if output is not None:
        there = folder.parent
        if there.exists() and not folder.is_dir() and (not there.is_dir() or any(there.iterdir())):
            raise WorkspaceError(f"{there}: contains other files. Try: --output NEW_FOLDER")
    with Workspace.claim(folder, config, fresh) as workspace:
        yield workspace
