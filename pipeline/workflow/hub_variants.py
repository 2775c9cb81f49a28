"""Variants of models that are on the Hub, or in a folder, published: beside the model itself, or elsewhere.

    quantize(Task(model="user/model", repo="user/model", quant_types=["both"]))

What a repository has of earlier runs for the same model stays a part of its release. In the model's own
repository the files that were there, and the card but for one marked section, stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.builders import quantize_config
from pipeline.config.calibration import FAST_QUALITY, QUALITIES
from pipeline.config.catalog import VARIANTS
from pipeline.config.limits import Gate
from pipeline.config.schema import PACKAGE_SOURCE, Config, Model, Quantize
from pipeline.errors import ConfigError, HubError, Interrupted, UserError
from pipeline.evaluation.gates import limits
from pipeline.evaluation.model_result import Verdict
from pipeline.hub.tree import CARD, LINEAGE
from pipeline.models.hub_inspection import inspect
from pipeline.models.sources import check_source, is_local
from pipeline.publishing.commit import check_root
from pipeline.publishing.published_model import PublishedModel, is_same_model, read_published
from pipeline.system.redaction import file_name
from pipeline.tracking.trackers.spaces import keep_in, space_at
from pipeline.workflow.kept_variants import removal
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.run import run
from pipeline.workflow.variant_tasks import Task, asked_variants
from pipeline.workflow.workspace import Workspace


def quantize(task: Task, root: str | Path = "runs", reporter: Reporter | None = None) -> Workspace:
    """Make the variants that a task asks for, measure and publish them; files that are there are not sent again.

    Args:
        root: folder under which the run's folder lies, if the task names no output.

    Raises:
        UserError: in one line, before any work if that is possible.
    """
    reporter = reporter or Reporter()
    space, server = _tracking(task)
    there = read_published(task.repo) if task.repo and not task.save_only else None
    config = configure(task, there, space, server)
    agreed = removal(task.remove, task.replace, task.replace_adapter)
    if there and (stay := [name for name in _staying_specs(task, there) if name not in asked_variants(task)]):
        reporter.show([f"{task.repo} has {', '.join(stay)} already, which will stay"])

    def tell_the_space() -> None:
        if task.dataset_repo and space:
            keep_in(space, task.dataset_repo)

    return run(
        config,
        root,
        reporter=reporter,
        output=task.output,
        publish_again=not task.save_only,
        removal=agreed,
        begin=tell_the_space,
    )


def configure(task: Task, there: PublishedModel | None, space: str | None = None, server: str | None = None) -> Config:
    """Return the configuration of a task's run.

    Args:
        there: the release in the repository, if that exists.
        space, server: the tracker that events go to besides this machine's own.

    Raises:
        UserError: if the model, the repository or an option is refused.
    """
    check_source(Model(source=task.model, low_disk=task.low_disk))
    asked = asked_variants(task)
    is_on_hub = not (PACKAGE_SOURCE.match(task.model) or is_local(task.model))
    is_guest = is_on_hub and not task.save_only and (task.repo or "").casefold() == task.model.casefold()
    if task.revision and not is_on_hub:
        raise ConfigError(f"--revision {task.revision}: only models on the Hub have revisions; {task.model} is none")
    commit = inspect(task.model, task.revision) if is_on_hub else None
    if there:
        asked = {**_staying(task, there), **asked}
        _check_place(task, there, is_guest, asked)
    settings: dict[str, Any] = {
        "name": task.experiment_name or (there.run if there else None),
        "quantize.variants": [asked[name] for name in VARIANTS if name in asked],  # whatever the order of the options
        "publish.repo": None if task.save_only else task.repo,
        "publish.private": task.private,
        "publish.commits": "single",
        "track.space": space,
        "track.server": server,
        **task.calibration_settings,
    }
    if not task.low_disk:
        settings |= {"evaluate.general": task.calibration, "evaluate.device": task.device}
        settings |= {"quantize.gate.rise": task.max_rise, "quantize.gate.kl": task.max_kl}
        settings |= {"quantize.on_gate_failure": task.on_gate_failure}
    return quantize_config(
        task.model,
        task.output or task.repo or task.model,
        [],
        measure=not task.low_disk,
        revision=_made_from(task.model, commit, there) if commit else None,
        settings=[f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None],
        low_disk=task.low_disk,
    )


def quantize_all(
    tasks: Sequence[Task], root: str | Path = "runs", reporter: Reporter | None = None
) -> list[str | None]:
    """Do tasks one after the other; one that fails does not stop those after it.

    Returns:
        For each task why it failed, or None.
    """
    problems: list[str | None] = []
    reporter = reporter or Reporter()
    for task in tasks:
        try:
            quantize(task, root, reporter)
            problems.append(None)
        except Interrupted:
            raise
        except UserError as error:
            problems.append(str(error))
            reporter.show([str(error)])
    return problems


def _specs(there: PublishedModel) -> dict[str, dict]:
    """Return the settings of each variant that a release has."""
    made = {name: result.variant for name, result in there.results.variants.items()}
    return {name: variant.to_json() for name in VARIANTS if (variant := made.get(name))}


def _staying_specs(task: Task, there: PublishedModel) -> dict[str, dict]:
    """Return the settings of each variant of a release that is not to be removed."""
    if task.replace:
        return {}
    removed = removal(task.remove).variants
    return {name: spec for name, spec in _specs(there).items() if name not in removed}


def _staying(task: Task, there: PublishedModel) -> dict[str, dict]:
    """Return the variants of a release that are not asked for now, with the settings and limits of that release.

    Raises:
        ConfigError: if one was calibrated or distilled, and would be made again without. Or if one was published with
            a warning, or before there were limits, and could be withheld now.
    """
    now, found = Quantize(gate=Gate(rise=task.max_rise, kl=task.max_kl)), _staying_specs(task, there)
    quality = task.calibration_settings.get("quantize.quality", FAST_QUALITY)
    for name in found.keys() - asked_variants(task).keys():
        verdict, weights = there.results[name].gate or Verdict(), there.results[name].weights
        made = weights.quality if weights else FAST_QUALITY
        if QUALITIES.index(quality) < QUALITIES.index(made):
            raise ConfigError(
                f"{task.repo}: has {name}, which was {made}, and would be made again with quality {quality}. "
                f"Try: --quality {made} --calibration-text TEXT, ask for it too (--quant-type), or --remove {name}"
            )
        if verdict.passed is False and task.on_gate_failure == "withhold":
            raise ConfigError(
                f"{task.repo}: has {name}, which misses its gate and was published with a warning, and would lose it; "
                "say --on-gate-failure warn, or ask for it too (--quant-type)"
            )
        if not verdict.limits and task.on_gate_failure != "warn":
            raise ConfigError(
                f"{task.repo}: has {name}, which was published without being held to limits, and could lose it; "
                "say --on-gate-failure warn, or ask for it too (--quant-type)"
            )
        if verdict.limits and verdict.limits != limits(now, name):
            found[name] = {**found[name], "gate": verdict.limits}
    return found


def _check_place(task: Task, there: PublishedModel, is_guest: bool, variants: Collection[str]) -> None:
    """Raise if the variants would stand beside another model, or would replace files that are not ours."""
    check_root(there.tree)
    name = file_name(task.model) if is_local(task.model) else task.model
    known = there.base.get("hub_id") or there.base.get("source")
    if known and str(known).casefold() != name.casefold():
        raise HubError(f"{task.repo}: holds variants of {known}, and this is {name}; use another repository")
    weights = [path for path in there.tree.files if "/" not in path and path.endswith((".safetensors", ".bin"))]
    if weights and not is_guest:
        raise HubError(
            f"{task.repo}: has a model of its own at its root ({weights[0]}); "
            f"use another repository, or quantize that model: {task.repo} {task.repo}"
        )
    ours = {path.split("/")[0] for path in there.tree.ours if "/" in path}
    new = tuple(f"{folder}/" for folder in {VARIANTS[name].folder for name in variants} if folder not in ours)
    theirs = [path for path in there.tree.files.keys() - there.tree.ours if Path(path).name != CARD]
    if taken := sorted(path for path in theirs if path == LINEAGE or path.startswith(new)):
        raise HubError(f"{task.repo}: has a {taken[0]} that tunepress did not put there; choose another repository")


def _made_from(repo: str, commit: str, there: PublishedModel | None) -> str:
    """Return the commit that a model's variants are made from: `commit`, or an earlier one with the same model.

    It stays the commit of the last release until files of the model itself change: people write into cards, and in
    the model's own repository every release moves the head.
    """
    known = there.base.get("revision") if there else None
    if not isinstance(known, str) or known == commit:
        return commit
    return known if is_same_model(repo, known, commit) else commit


def _tracking(task: Task) -> tuple[str | None, str | None]:
    """Return the Space and the server that events go to besides this machine's own tracker; at most one is set."""
    space = space_at(task.trackio_url) if task.trackio_url else None
    if task.dataset_repo and space is None:
        raise ConfigError(
            f"--dataset-repo {task.dataset_repo}: only a Space keeps Trackio's data in a data set; "
            "name the Space with --trackio-url https://huggingface.co/spaces/USER/NAME"
        )
    return space, None if space else task.trackio_url
