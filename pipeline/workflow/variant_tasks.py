"""Tasks for `hub_variants`: one model each, from options or from a YAML file with a list of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.config.base import Count, Real, Section, Whole
from pipeline.config.builders import calibration_settings, read_target, variant_specs
from pipeline.config.calibration import FAST_QUALITY, QUALITIES
from pipeline.config.catalog import VARIANTS
from pipeline.config.limits import Target
from pipeline.config.loader import explain, read_yaml
from pipeline.config.presets import names_to_choose
from pipeline.config.quantize import Quantize
from pipeline.config.schema import repository_id, run_name
from pipeline.errors import ConfigError

GROUP_SIZE = 128  # of variants that are in groups, unless asked for otherwise


class Task(Section):
    """One model and the variants to make of it: the options of `scripts/quantize_standalone.py`."""

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
    quality: Literal[*QUALITIES] | None = Field(  # type: ignore[valid-type]  # named once, in `config.quantize`
        default=None, description="by default the second if there is calibration text, else the first"
    )
    calibration_text: list[str] = Field(default=[], description="files or data sets to calibrate on, mixed evenly")
    calibration_tokens: Count | None = Field(default=None, description="tokens of this text")
    target: Target | None = Field(default=None, description="what variants with different bits by layer must reach")
    low_disk: bool = False
    max_rise: Real | None = Field(default=None, gt=0, description="of perplexity, as a share")
    max_kl: Real | None = Field(default=None, gt=0, description="nats a token")
    on_gate_failure: Literal["withhold", "warn", "escalate"] = "withhold"  # the last is read as a target
    remove: list[str] = Field(default=[], description="variants of earlier releases to remove; all others stay")
    replace: bool = Field(default=False, description="remove every variant that is not among quant_types")
    replace_adapter: bool = Field(default=False, description="remove an adapter of other people at the root")

    @field_validator("repo", "dataset_repo")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        return repository_id(value)

    @field_validator("calibration_text", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("target", mode="before")
    @classmethod
    def _target(cls, value: Any) -> Any:
        return read_target(value) if isinstance(value, str) else value

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
        if self.low_disk and (self.calibration_text or self.target):
            raise ValueError("calibration_text, target: need the whole model; leave them or low_disk out")
        if not self.calibration_text and (self.target or self.quality not in (None, FAST_QUALITY)):
            asked = "target" if self.target else f"quality {self.quality}"
            raise ValueError(f"{asked}: needs a text to calibrate on. Try: --calibration-text FILE.txt")
        return self

    @property
    def calibration_settings(self) -> dict[str, Any]:
        """Return its calibration as keys of a configuration.

        Raises:
            ConfigError: if nothing uses its text.
        """
        targeted = self.target is not None
        return calibration_settings(self.quality, self.calibration_text, self.calibration_tokens, targeted)


def read_task(values: dict[str, Any], origin: str) -> Task:
    """Return a task from plain data; errors name its `origin`.

    Raises:
        ConfigError: if a field is invalid.
    """
    try:
        task = Task.model_validate(values)
        quality = task.calibration_settings.get("quantize.quality", FAST_QUALITY)
        Quantize.model_validate({"variants": list(asked_variants(task).values()), "quality": quality})
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error, Task)}") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return task


def read_tasks(path: Path, options: dict[str, Any]) -> list[Task]:
    """Return the tasks of a YAML file: a list of mappings, each with `model`, `repo` and other fields of `Task`.

    Args:
        options: fields of each task that does not set them.

    Raises:
        ConfigError: if the file is invalid.
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


def asked_variants(task: Task) -> dict[str, dict]:
    """Return the requested variants by name, in the form of `quantize.variants`."""
    target = task.target.asked if task.target else None
    specs = variant_specs(task.quant_types, task.group_size, option="--quant-type", target=target)
    if not specs:
        asked = ",".join(task.quant_types)
        raise ConfigError(f"--quant-type {asked!r}: names no variant; known are {names_to_choose()}")
    for spec in specs if task.group_size is None else ():
        variant = VARIANTS[spec["name"]]
        if variant.group_size and GROUP_SIZE in variant.group_sizes:
            spec.setdefault("group_size", GROUP_SIZE)
    return {spec["name"]: spec for spec in specs}
