"""The one typed run configuration: what can be set, its defaults, and what is allowed.

Plain data in, a frozen `Config` out (`parse_config`); whatever is wrong is a `ConfigError`
that names the key, the value and what is allowed, in one line. `pipeline.config_file`
reads it from YAML.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.catalog import DATA_FORMS, GROUP_SIZES, VARIANTS, resolve_variants, variant_names
from pipeline.errors import ConfigError, redact

# The Hub's own rules: no "--" and "..", no ".git" at the end, and no name that begins or ends in a mark.
_REPO_PART = r"[A-Za-z0-9]([\w.-]{0,94}\w)?"
REPO_ID = re.compile(rf"(?!.*(--|\.\.|\.git\Z)){_REPO_PART}/{_REPO_PART}\Z", re.ASCII)
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
PACKAGE_SOURCE = re.compile(r"package:([A-Za-z_]\w*)/([\w.-]+\.gguf)\Z", re.ASCII)


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def _not_bool(value: Any) -> Any:
    """YAML's `yes` and `true` are no numbers, whatever Python thinks."""
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


Whole = Annotated[int, BeforeValidator(_not_bool)]
Real = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
Rate = Annotated[Real, Field(gt=0, le=1)]


class Model(Section):
    source: str = Field(min_length=1, description="Hub id, folder, or package:NAME/FILE.gguf")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    trust_remote_code: bool = False

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
    form: Literal["auto", *DATA_FORMS] = "auto"  # type: ignore[valid-type]
    split: str = Field(default="train", min_length=1)
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
        return value


class Train(Section):
    method: Literal["qlora", "lora"] = "qlora"
    lora: Lora = Lora()
    epochs: Real = Field(default=1, gt=0, le=1000)
    max_steps: Count | None = None
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


class Evaluate(Section):
    general: str = Field(default="builtin:python-topics", description="general text: builtin, a .txt file")
    max_tokens: Whole = Field(default=16384, ge=256, description="tokens measured of each text")
    prompts: list[str] = Field(default=[], description="questions whose answers the card shows")


class VariantSpec(Section):
    name: str
    group_size: Whole | None = None
    rounding: str | None = None
    keep: list[str] = Field(default=[], description="name patterns of layers left in bf16")

    @model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_the_catalog(self) -> VariantSpec:
        if self.name not in VARIANTS:
            raise ValueError(f"allowed are {variant_names()}")
        variant = VARIANTS[self.name]
        if self.group_size is not None and not variant.grouped:
            raise ValueError(f"{self.name} has one scale per row and takes no group_size")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {self.group_size}: allowed are {', '.join(map(str, GROUP_SIZES))}")
        if self.rounding is not None and self.rounding not in variant.roundings:
            raise ValueError(f"rounding {self.rounding!r}: allowed for {self.name} are {', '.join(variant.roundings)}")
        return self

    def resolved(self) -> VariantSpec:
        """The same with the defaults of the catalog filled in."""
        variant = VARIANTS[self.name]
        return self.model_copy(
            update={
                "group_size": (self.group_size or 64) if variant.grouped else None,
                "rounding": self.rounding or variant.roundings[0],
            }
        )


def _expand_aliases(value: Any) -> Any:
    """`both` and friends become the variants they stand for; a single name becomes a list."""
    if isinstance(value, (str, dict)):
        value = [value]
    if not isinstance(value, list):
        return value
    expanded = []
    for item in value:
        name = item.get("name") if isinstance(item, dict) else item
        try:
            names = resolve_variants(name)
        except (KeyError, AttributeError):  # left for the check that can say where it stands
            expanded.append(item)
            continue
        expanded += [{**item, "name": n} if isinstance(item, dict) else n for n in names]
    return expanded


class Quantize(Section):
    variants: Annotated[list[VariantSpec], BeforeValidator(_expand_aliases)] = Field(
        default=[VariantSpec(name="int8"), VariantSpec(name="int4")], validate_default=True
    )

    @field_validator("variants")
    @classmethod
    def _once_each(cls, value: list[VariantSpec]) -> list[VariantSpec]:
        names = [v.name for v in value]
        if len(set(names)) != len(names):
            raise ValueError("each variant can be asked for once")
        return [v.resolved() for v in value]

    def spec(self, name: str) -> VariantSpec:
        return next(v for v in self.variants if v.name == name)


class Publish(Section):
    repo: str | None = Field(default=None, description="USER/NAME on the Hub")
    private: bool = True
    commits: Literal["per_stage", "single"] = "per_stage"

    @field_validator("repo")
    @classmethod
    def _repo(cls, value: str | None) -> str | None:
        if value is not None and not REPO_ID.match(value):
            raise ValueError("a repository is written USER/NAME, with letters, digits, '-', '_' and '.'")
        return value


class Track(Section):
    project: str = Field(default="tunepress", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Config(Section):
    """Everything a run needs to know. Same content, same run."""

    name: str = Field(description="the run's folder, and the Trackio run")
    model: Model
    data: Data
    train: Train = Train()
    merge: Merge = Merge()
    evaluate: Evaluate = Evaluate()
    quantize: Quantize = Quantize()
    publish: Publish = Publish()
    track: Track = Track()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not RUN_NAME.match(value):
            raise ValueError("a run's name has letters, digits, '.', '_' and '-', and no spaces")
        return value


def parse_config(tree: dict, origin: str) -> Config:
    """A `Config` from plain data; `origin` is named in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The configuration as YAML, every default written out."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError) -> str:
    first, *rest = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]"))
    if first["type"] == "extra_forbidden":
        message = f"{key}: unknown key{_did_you_mean(first['loc'])}"
    elif first["type"] == "missing":
        message = f"{key}: missing, and it has no default"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{key}: {cut(redact(_show(first['input'])))} is refused: {reason}"
    return message + (f" (and {len(rest)} more)" if rest else "")


def _show(value: Any, depth: int = 2) -> str:
    """A value as YAML has it on one line. Aliases can make a small file stand for a huge or endless value."""
    if isinstance(value, dict):
        few = [f"{key}: {_show(v, depth - 1)}" for key, v in list(value.items())[:4]] if depth else []
        return "{" + ", ".join(few + ["..."] * (len(few) < len(value))) + "}"
    if isinstance(value, list):
        few = [_show(v, depth - 1) for v in value[:4]] if depth else []
        return "[" + ", ".join(few + ["..."] * (len(few) < len(value))) + "]"
    return json.dumps(value, default=str, ensure_ascii=False)


def cut(text: str) -> str:
    """At most 80 characters of a text that an error repeats."""
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(location: tuple) -> str:
    section: Any = Config
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(section, type) else None
        section = field.annotation if field is not None else None
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        section = VariantSpec
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here are {', '.join(known)}"
