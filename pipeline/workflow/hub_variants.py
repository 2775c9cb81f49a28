"""Variants of models that are on the Hub, or in a folder, published: beside the model itself, or elsewhere.

    quantize(Task(model="user/model", repo="user/model", quant_types=["both"]))

What a repository has of earlier runs for the same model stays a part of its release. In the model's own
repository the files that were there, and the card but for one marked section, stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.base import Real, Section, Whole
from pipeline.config.builders import quantize_config, variant_specs
from pipeline.config.catalog import VARIANTS, variant_names
from pipeline.config.loader import explain, read_yaml
from pipeline.config.schema import PACKAGE_SOURCE, Config, Model, Quantize, repository_id, run_name
from pipeline.errors import ConfigError, HubError, Interrupted, UserError
from pipeline.evaluation.gates import limits
from pipeline.hub.tree import CARD, LINEAGE
from pipeline.models.hub_inspection import inspect
from pipeline.models.sources import check_source, is_local
from pipeline.publishing.commit import check_root
from pipeline.publishing.remote_release import Standing, is_same_model, standing
from pipeline.system.redaction import file_name
from pipeline.tracking.trackers.spaces import keep_in, space_at
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.run import run
from pipeline.workflow.workspace import Workspace

GROUP_SIZE = 128  # of variants that are in groups, unless asked for otherwise


class Task(Section):
    """One model, and what is to become of it: the options of `scripts/quantize_standalone.py`."""

    model: str = Field(min_length=1, description="Hub id, or folder")
    repo: str | None = Field(default=None, description="USER/NAME to publish to; may be the model's own")
    quant_types: list[str] = Field(default=["int8_weight_only"], min_length=1)
    group_size: Whole | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    private: bool = Field(default=True, description="visibility of a new repository")
    trackio_url: str | None = Field(default=None, min_length=1)
    experiment_name: str | None = Field(default=None, description="name of the run")
    dataset_repo: str | None = Field(default=None, description="where the Space keeps Trackio's data")
    save_only: bool = False
    revision: str | None = Field(default=None, min_length=1)
    output: str | None = Field(default=None, min_length=1, description="folder that becomes the release")
    calibration: str | None = Field(
        default=None, min_length=1, description="text to measure on: a .txt file, or builtin:NAME"
    )
    low_disk: bool = False
    max_rise: Real | None = Field(default=None, gt=0, description="of perplexity, as a share")
    max_kl: Real | None = Field(default=None, gt=0, description="nats a token")
    on_gate_failure: Literal["withhold", "warn", "escalate"] = "withhold"

    @field_validator("repo", "dataset_repo")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        return repository_id(value)

    @field_validator("experiment_name")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        return None if value is None else run_name(value)

    @model_validator(mode="after")
    def _options_fit(self) -> Task:
        if self.repo is None and not self.save_only:
            raise ValueError("repo: say where to publish to, as USER/NAME, or use --save-only")
        if self.low_disk and not self.save_only:
            raise ValueError(
                "low_disk: what is published is measured, which needs the whole model; use it with --save-only"
            )
        if self.low_disk and self.calibration:
            raise ValueError("calibration: with low_disk nothing is measured; leave one of them out")
        if self.low_disk and (self.max_rise or self.max_kl):
            raise ValueError("max_rise, max_kl: with low_disk nothing is measured; leave them or low_disk out")
        return self


def quantize(task: Task, root: str | Path = "runs", reporter: Reporter | None = None) -> Workspace:
    """Make the variants that a task asks for, measure and publish them; what is there already is not sent again.

    Args:
        root: folder under which the run's folder lies, where the task names no output.

    Raises:
        UserError: in one line, before any work where that is possible.
    """
    reporter = reporter or Reporter()
    space, server = _tracking(task)
    there = None if task.save_only else standing(task.repo)
    config = configure(task, there, space, server)
    if there and (stay := [name for name in _specs(there) if name not in _asked(task)]):
        reporter.show([f"{task.repo} has {', '.join(stay)} already, which will stay"])

    def tell_the_space() -> None:
        if task.dataset_repo:
            keep_in(space, task.dataset_repo)

    return run(
        config, root, reporter=reporter, output=task.output, publish_again=not task.save_only, begin=tell_the_space
    )


def configure(task: Task, there: Standing | None, space: str | None = None, server: str | None = None) -> Config:
    """The configuration of a task's run.

    Args:
        there: what there is in the repository, if that exists.

    Raises:
        UserError: where the model, the repository or an option is refused.
    """
    check_source(Model(source=task.model, low_disk=task.low_disk))
    asked = _asked(task)
    is_on_hub = not (PACKAGE_SOURCE.match(task.model) or is_local(task.model))
    is_guest = is_on_hub and not task.save_only and task.repo.casefold() == task.model.casefold()
    if task.revision and not is_on_hub:
        raise ConfigError(f"--revision {task.revision}: only models on the Hub have revisions; {task.model} is none")
    commit = inspect(task.model, task.revision) if is_on_hub else None
    if there:
        asked = {**_staying(task, there), **asked}
        _check_place(task, there, is_guest, asked)
    settings = {
        "name": task.experiment_name or (there.run if there else None),
        "quantize.variants": [asked[name] for name in VARIANTS if name in asked],  # whatever the order of the options
        "publish.repo": None if task.save_only else task.repo,
        "publish.private": task.private,
        "publish.commits": "single",
        "track.space": space,
        "track.server": server,
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


def read_task(values: dict[str, Any], origin: str) -> Task:
    """A task from plain data; `origin` is named in errors.

    Raises:
        ConfigError: for anything that is wrong with it.
    """
    try:
        task = Task.model_validate(values)
        Quantize(variants=list(_asked(task).values()))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error, Task)}") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return task


def read_tasks(path: Path, options: dict[str, Any]) -> list[Task]:
    """The tasks of a YAML file: a list of mappings, each with `model`, `repo` and other fields of `Task`.

    Args:
        options: what holds for each of them that does not say otherwise.

    Raises:
        ConfigError: for anything that is wrong with it; nothing is begun then.
    """
    try:
        entries = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of models ({error})") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: a list of models is written as '- model: USER/MODEL', with 'repo: USER/NAME' below")
    if repo := options.get("repo"):
        raise ConfigError(f"{path}: each model of a list has a repo of its own there; leave out {repo}")
    tasks = [read_task({**options, **entry}, f"{path}: model {n}") for n, entry in enumerate(entries, start=1)]
    seen: dict[str, int] = {}
    for n, task in enumerate(tasks, start=1):
        place = task.output or task.experiment_name or Path(task.repo or task.model).name
        if place in seen:
            raise ConfigError(
                f"{path}: models {seen[place]} and {n} would both be made in {place!r}; give one an experiment_name"
            )
        seen[place] = n
    return tasks


def quantize_all(
    tasks: Sequence[Task], root: str | Path = "runs", reporter: Reporter | None = None
) -> list[str | None]:
    """Do tasks one after the other; one that fails does not stop those after it.

    Returns:
        For each of them why it failed, or None.
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


def _asked(task: Task) -> dict[str, dict]:
    """The variants that are asked for, as `quantize.variants` takes them."""
    names = [spec["name"] for spec in variant_specs(task.quant_types, option="--quant-type")]
    if not names:
        raise ConfigError(f"--quant-type {','.join(task.quant_types)!r}: names no variant; known are {variant_names()}")
    in_groups = [name for name in names if VARIANTS[name].group_size and GROUP_SIZE in VARIANTS[name].group_sizes]
    size = GROUP_SIZE if task.group_size is None and in_groups else task.group_size
    return {spec["name"]: spec for spec in variant_specs(names, size)}


def _specs(there: Standing) -> dict[str, dict]:
    """What was asked for of each variant that a release has."""
    results = there.told.get("results") or {}
    return {name: results[name]["variant"] for name in VARIANTS if "variant" in (results.get(name) or {})}


def _staying(task: Task, there: Standing) -> dict[str, dict]:
    """The variants of a release that are not asked for now, as they were made, with the limits that they were held to.

    Raises:
        ConfigError: where one was published with a warning, or before there were limits, and could be withheld now.
    """
    now, found = Quantize(gate={"rise": task.max_rise, "kl": task.max_kl}), _specs(there)
    for name in found.keys() - _asked(task).keys():
        verdict = there.told["results"][name].get("gate") or {}
        if verdict.get("passed") is False and task.on_gate_failure == "withhold":
            raise ConfigError(
                f"{task.repo}: has {name}, which misses its gate and was published with a warning, and would lose it; "
                "say --on-gate-failure warn, or ask for it too (--quant-type)"
            )
        if "limits" not in verdict and task.on_gate_failure != "warn":
            raise ConfigError(
                f"{task.repo}: has {name}, which was published without being held to limits, and could lose it; "
                "say --on-gate-failure warn, or ask for it too (--quant-type)"
            )
        if "limits" in verdict and verdict["limits"] != limits(now, name):
            found[name] = {**found[name], "gate": verdict["limits"]}
    return found


def _check_place(task: Task, there: Standing, is_guest: bool, variants: Collection[str]) -> None:
    """Raise where the variants of this model would stand beside another, or replace another's or people's files."""
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


def _made_from(repo: str, commit: str, there: Standing | None) -> str:
    """The commit that a model's variants are made from, which is `commit` or as good as it.

    It stays the one that the last release was made from until files of the model itself change: people write
    into cards, and in the model's own repository every release moves the head.
    """
    known = there.base.get("revision") if there else None
    if not isinstance(known, str) or known == commit:
        return commit

    return known if is_same_model(repo, known, commit) else commit


def _tracking(task: Task) -> tuple[str | None, str | None]:
    """(Space, server) that a task's events go to besides this machine's own Trackio; at most one of them."""
    space = space_at(task.trackio_url) if task.trackio_url else None
    if task.dataset_repo and space is None:
        raise ConfigError(
            f"--dataset-repo {task.dataset_repo}: only a Space keeps Trackio's data in a data set; "
            "name the Space with --trackio-url https://huggingface.co/spaces/USER/NAME"
        )
    return space, None if space else task.trackio_url
