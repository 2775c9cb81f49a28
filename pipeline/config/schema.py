"""The typed configuration of a run: its keys, their defaults and their allowed values.

`pipeline.config.loader` reads it from YAML and reports the first problem in one line.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidatorFunctionWrapHandler, field_validator, model_validator

from pipeline.config.base import Real, Section, Whole
from pipeline.config.calibration import with_quality
from pipeline.config.catalog import VARIANTS
from pipeline.config.data import Data
from pipeline.config.former_keys import with_targets
from pipeline.config.names import LICENSE, PACKAGE_SOURCE, REPO_ID, RUN_NAME, repository_id, run_name
from pipeline.config.qat import check_qat, with_qat
from pipeline.config.quantize import Quantize, VariantSpec
from pipeline.config.track import TRACK_SECTIONS, Track, TrackioSettings
from pipeline.config.train import Lora, Train
from pipeline.config.training_catalog import ADAPTER, NF4_BASE, UNCHANGED_BASE

__all__ = [
    "Config", "Data", "Evaluate", "Lora", "MeasuredRun", "Merge", "Model", "PACKAGE_SOURCE", "Publish", "Quantize",
    "REPO_ID", "RUN_NAME", "Track", "Train", "TrainingRun", "VariantSpec", "repository_id", "run_name",
]  # fmt: skip


class Model(Section):
    """The base model."""

    source: str = Field(min_length=1, description="Hub id, folder, or `package:NAME/FILE.gguf`")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    trust_remote_code: bool = Field(default=False, description="must stay false: a model's own code is never run")
    low_disk: bool = Field(default=False, description="fetch and quantize one shard at a time, then remove the shard")

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        if value.startswith("package:") and not PACKAGE_SOURCE.match(value):
            raise ValueError("a packaged model is written package:NAME/FILE.gguf")
        return value

    @field_validator("trust_remote_code")
    @classmethod
    def _no_remote_code(cls, value: bool) -> bool:
        if value:
            raise ValueError("a model's own code is never run, for it would have to be published with the result")
        return value


class Merge(Section):
    """The merge of the adapter into the base model."""

    base: Literal["auto", NF4_BASE, UNCHANGED_BASE] = Field(  # type: ignore[valid-type]  # the catalogue has the names
        default="auto", description="base to merge into; `auto` tries both after QLoRA and keeps the better one"
    )
    adapter: str | None = Field(
        default=None, min_length=1, description="an adapter trained elsewhere: a folder, or a Hub id"
    )


class Evaluate(Section):
    """The measurements. `evaluate: null` measures nothing, for runs that neither train nor publish."""

    general: str = Field(
        default="builtin:python-topics",
        description="general text: `builtin:python-topics`, or a .txt file; two empty lines separate documents",
    )
    max_tokens: Whole = Field(default=16384, ge=256, description="tokens of each text to measure on")
    max_minutes: Real | None = Field(
        default=None, gt=0, le=100_000, description="measure each model on fewer tokens if they would take longer"
    )
    prompts: list[str] = Field(default=[], description="questions; the card shows the answers")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="device that models are measured on")


class Publish(Section):
    """The repository on the Hub."""

    repo: str | None = Field(default=None, description="USER/NAME on the Hub; without it nothing is published")
    private: bool = Field(default=True, description="visibility of a new repository")
    commits: Literal["per_stage", "single"] = Field(
        default="per_stage", description="publish after every stage, or once at the end"
    )
    create_pr: bool = Field(default=False, description="open a pull request instead of committing to the main branch")
    license: str | None = Field(
        default=None, description="license of the release, as the Hub names it; by default that of the base model"
    )
    description: str | None = Field(
        default=None, min_length=1, max_length=4000, description="your text for the top of the card"
    )
    mirrors: dict[str, str] = Field(
        default={}, description="a variant -> a repository that holds this variant at its root"
    )

    @property
    def target(self) -> str:
        """The repository of a run that publishes."""
        assert self.repo is not None, "only runs that publish have a target"
        return self.repo

    @field_validator("repo")
    @classmethod
    def _repo(cls, value: str | None) -> str | None:
        return repository_id(value)

    @field_validator("license")
    @classmethod
    def _license(cls, value: str | None) -> str | None:
        if value is not None and not LICENSE.match(value):
            raise ValueError("a license is written as on the Hub, such as apache-2.0")
        return value

    @field_validator("mirrors")
    @classmethod
    def _mirrors(cls, value: dict[str, str]) -> dict[str, str]:
        for variant, repo in value.items():
            if variant not in VARIANTS:
                raise ValueError(f"{variant!r} is no variant; allowed are {', '.join(VARIANTS)}")
            repository_id(repo)
        if len(set(value.values())) != len(value):
            raise ValueError("each mirror needs a repository of its own")
        return value

    @model_validator(mode="after")
    def _mirrors_fit(self) -> Publish:
        if self.mirrors and self.repo is None:
            raise ValueError("mirrors: need a main repository. Try: set publish.repo")
        if self.repo in self.mirrors.values():
            raise ValueError(f"mirrors: {self.repo} is the main repository. Try: another repository for the mirror")
        return self


class Config(Section):
    """The configuration of a run. The same content gives the same run.

    With `data: null` nothing is trained: the model is quantized as it is, or after merging `merge.adapter`.
    """

    name: str = Field(description="name of the run's folder below `runs/`, and of the run in the tracker")
    model: Model = Field(description="the base model")
    data: Data | None = Field(description="the data set")
    train: Train = Field(default=Train(), description="fine-tuning")
    merge: Merge = Field(default=Merge(), description="merging the adapter")
    evaluate: Evaluate | None = Field(default=Evaluate(), description="measuring")
    quantize: Quantize = Field(default=Quantize(), description="the variants")
    publish: Publish = Field(default=Publish(), description="the repository on the Hub")
    track: SerializeAsAny[TrackioSettings] = Field(default=TrackioSettings(), description="the experiment tracker")

    @field_validator("track", mode="wrap", json_schema_input_type=reduce(or_, TRACK_SECTIONS.values()))
    @classmethod
    def _section_of_its_tracker(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Track:
        """Return the section of the named tracker; the default section refuses unknown names."""
        if isinstance(value, Track):
            return value
        named = value.get("tracker") if isinstance(value, dict) else None
        section = TRACK_SECTIONS.get(named) if isinstance(named, str) else None
        return section.model_validate(value) if section else read(value)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return run_name(value)

    @model_validator(mode="before")
    @classmethod
    def _keys_of_this_version(cls, tree: Any) -> Any:
        """Return the keys of this version for those of earlier ones, and the quality that a training has by default."""
        return with_qat(with_quality(with_targets(tree))) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.data and self.merge.adapter:
            raise ValueError("data and merge.adapter: train an adapter, or bring one, not both")
        if self.data and self.evaluate is None:
            raise ValueError("evaluate: a trained model must be measured. Try: leave out the key")
        if self.publish.repo and self.evaluate is None:
            raise ValueError("evaluate: a published model must be measured. Try: leave out the key, or use --measure")
        if self.model.low_disk and self.merges:
            raise ValueError("model.low_disk: training and merging need the whole model. Try: model.low_disk=false")
        if self.model.low_disk and self.evaluate:
            raise ValueError(
                "model.low_disk: measuring needs the whole model. Try: leave out --measure (evaluate: null)"
            )
        if self.evaluate is None and (aimed := [v.name for v in self.quantize.variants if v.target and v.target.rise]):
            raise ValueError(
                f"evaluate: the target rise of {aimed[0]} must be measured. Try: leave out the key, or use --measure"
            )
        missing = sorted(self.publish.mirrors.keys() - {spec.name for spec in self.quantize.variants})
        if missing:
            raise ValueError(f"publish.mirrors: {missing[0]} is not among quantize.variants")
        check_qat(self)
        kind = TrainingRun if self.data else MeasuredRun if self.evaluate else Config
        return self if isinstance(self, kind) else kind.model_construct(self.model_fields_set, **dict(self))

    @property
    def merges(self) -> bool:
        """Return True if a model is made here, by training or merging, that the release has at its root."""
        return self.data is not None or self.merge.adapter is not None

    @property
    def has_adapter(self) -> bool:
        """Return True if an adapter is trained or brought, which the release then has beside the merged model."""
        return self.merge.adapter is not None or (self.data is not None and self.train.adapts)


class MeasuredRun(Config):
    """The configuration of a run that measures its models; reading a `Config` returns this type if it applies."""

    evaluate: Evaluate = Evaluate()


class TrainingRun(MeasuredRun):
    """The configuration of a run that trains and measures; reading a `Config` returns this type if it applies."""

    data: Data

    def preference_run(self) -> TrainingRun:
        """Return the second training of `train.preference`, on its own data and settings, as a run of its own."""
        second = self.train.preference
        assert second is not None, "only runs with train.preference have a second training"
        asked = {name: getattr(second, name) for name in type(second).model_fields if name != "data"}
        options = {key: value for key, value in self.train.lora.options.items() if key != "init_lora_weights"}
        lora = self.train.lora.model_copy(update={"options": options})  # the adapter already has its first weights
        update = {**asked, ADAPTER: lora, "preference": None, "early_stopping": None, "max_minutes": None}
        return self.model_copy(update={"data": second.data, "train": self.train.model_copy(update=update)})
