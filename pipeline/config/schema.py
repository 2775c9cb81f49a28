"""The one typed run configuration: what can be set, its defaults, and what is allowed.

`pipeline.config.loader` reads it from YAML, and says in one line what is wrong with it.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Rate, Real, Section, Seed, Whole
from pipeline.config.catalog import DATA_FORMS, VARIANTS
from pipeline.config.quantize import Quantize, VariantSpec

__all__ = [
    "Config", "Data", "Evaluate", "Lora", "Merge", "Model", "PACKAGE_SOURCE", "Publish", "Quantize", "REPO_ID",
    "RUN_NAME", "Track", "Train", "VariantSpec", "repository_id", "run_name",
]  # fmt: skip

# The Hub's own rules: no "--" and "..", no ".git" at the end, and no name that begins or ends in a mark.
_REPO_PART = r"[A-Za-z0-9]([\w.-]{0,94}\w)?"
REPO_ID = re.compile(rf"(?!.*(--|\.\.|\.git\Z)){_REPO_PART}/{_REPO_PART}\Z", re.ASCII)
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
PACKAGE_SOURCE = re.compile(r"package:([A-Za-z_]\w*)/([\w.-]+\.gguf)\Z", re.ASCII)


class Model(Section):
    source: str = Field(min_length=1, description="Hub id, folder, or package:NAME/FILE.gguf")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    trust_remote_code: bool = False
    low_disk: bool = Field(default=False, description="quantize shard by shard, each removed when it was read")

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


class Data(Section):
    source: str = Field(min_length=1, description="file, Hub id, or builtin:python-docs")
    subset: str | None = Field(default=None, min_length=1, description="configuration of a data set on the Hub")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    split: str = Field(default="train", min_length=1)
    form: Literal["auto", *DATA_FORMS] = "auto"  # type: ignore[valid-type]
    columns: dict[str, str] = Field(default={}, description="a form's column -> its name in this data set")
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    held_out: Real = Field(default=0.05, gt=0, lt=0.9, description="share kept out of training")
    limit: Count | None = Field(default=None, description="use at most this many examples")
    seed: Seed = 0


class Lora(Section):
    rank: Count = 16
    alpha: Real = Field(default=32, gt=0)
    dropout: Real = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"

    @field_validator("target_modules")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not names or "lm_head" in names:
            raise ValueError("'all-linear' or a list of module names; lm_head cannot be trained here")
        if isinstance(value, str):  # which peft takes for a pattern
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"no regular expression ({error}); write module names as a list") from None
        return value


class Train(Section):
    method: Literal["qlora", "lora"] = "qlora"
    lora: Lora = Lora()
    epochs: Real = Field(default=1, gt=0, le=1000)
    max_steps: Count | None = None
    max_minutes: Real | None = Field(default=None, gt=0, le=100_000, description="stop training after this time")
    batch_size: Count = 4
    accumulate: Count = 4
    learning_rate: Rate = 2.0e-4
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: Real = Field(default=0.03, ge=0, lt=1, description="share of the steps")
    max_length: Count = Field(default=1024, description="tokens per training sequence")
    packing: bool = True
    loss_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    checkpoint_every: Count = 100
    evaluate_every: Count = 100
    seed: Seed = 0


class Merge(Section):
    base: Literal["auto", "nf4", "bf16"] = "auto"
    adapter: str | None = Field(default=None, min_length=1, description="trained elsewhere: a folder, or a Hub id")


class Evaluate(Section):
    general: str = Field(default="builtin:python-topics", description="general text: builtin, a .txt file")
    max_tokens: Whole = Field(default=16384, ge=256, description="tokens measured of each text")
    max_minutes: Real | None = Field(
        default=None, gt=0, le=100_000, description="measure each model on fewer tokens if they would take longer"
    )
    prompts: list[str] = Field(default=[], description="questions whose answers the card shows")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where models are measured")


class Publish(Section):
    repo: str | None = Field(default=None, description="USER/NAME on the Hub")
    private: bool = True
    commits: Literal["per_stage", "single"] = "per_stage"
    create_pr: bool = Field(default=False, description="open a pull request instead of committing to the main branch")
    mirrors: dict[str, str] = Field(default={}, description="variant -> a repository that has it at its root")

    @field_validator("repo")
    @classmethod
    def _repo(cls, value: str | None) -> str | None:
        return repository_id(value)

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
            raise ValueError("mirrors: need a main repository that they mirror; set publish.repo")
        if self.repo in self.mirrors.values():
            raise ValueError(f"mirrors: {self.repo} is the repository itself; a mirror needs one of its own")
        return self


def repository_id(value: str | None) -> str | None:
    """`value`, if it is one that the Hub takes.

    Raises:
        ValueError: saying how it is written.
    """
    if value is not None and not REPO_ID.match(value):
        raise ValueError("a repository is written USER/NAME, with letters, digits, '-', '_' and '.'")
    return value


def run_name(value: str) -> str:
    """`value`, if a run can be called that.

    Raises:
        ValueError: saying how it is written.
    """
    if not RUN_NAME.match(value):
        raise ValueError("a run's name has letters, digits, '.', '_' and '-', and no spaces")
    return value


def _has_host(address: str) -> bool:
    """Can an address be taken apart into a host and, where it has one, a port?"""
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class Track(Section):
    project: str = Field(default="tunepress", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    space: str | None = Field(default=None, description="USER/NAME of a Space that shows the dashboard")
    server: str | None = Field(default=None, description="address of a Trackio server of your own")

    @field_validator("space")
    @classmethod
    def _space(cls, value: str | None) -> str | None:
        return repository_id(value)

    @field_validator("server")
    @classmethod
    def _server(cls, value: str | None) -> str | None:
        if value is not None and not (re.match(r"https?://[^\s@?#]+\Z", value) and _has_host(value)):
            raise ValueError("an address such as https://trackio.example.org; its token goes in TRACKIO_WRITE_TOKEN")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Track:
        if self.space and self.server:
            raise ValueError("a Space or a server, not both")
        return self


class Config(Section):
    """Everything a run needs to know. Same content, same run.

    Without `data` nothing is trained: the model is quantized as it is, or with `merge.adapter` in it.
    Without `evaluate` nothing is measured, which only a run without training may ask for.
    """

    name: str = Field(description="the run's folder, and the Trackio run")
    model: Model
    data: Data | None
    train: Train = Train()
    merge: Merge = Merge()
    evaluate: Evaluate | None = Evaluate()
    quantize: Quantize = Quantize()
    publish: Publish = Publish()
    track: Track = Track()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return run_name(value)

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.data and self.merge.adapter:
            raise ValueError("data and merge.adapter: train an adapter, or bring one, not both")
        if self.data and self.evaluate is None:
            raise ValueError("evaluate: a model that is trained is measured too; leave the key out for the defaults")
        if self.publish.repo and self.evaluate is None:
            raise ValueError("evaluate: what is published is measured; leave the key out, or use --measure")
        if self.model.low_disk and self.merges:
            raise ValueError("model.low_disk: for quantizing a model as it is; training and merging need all of it")
        if self.model.low_disk and self.evaluate:
            raise ValueError("model.low_disk: measuring needs the whole model; leave out --measure (evaluate: null)")
        missing = sorted(self.publish.mirrors.keys() - {spec.name for spec in self.quantize.variants})
        if missing:
            raise ValueError(f"publish.mirrors: {missing[0]} is not among quantize.variants")
        return self

    @property
    def merges(self) -> bool:
        """Is there an adapter, so that the release has a model of its own at its root?"""
        return self.data is not None or self.merge.adapter is not None
