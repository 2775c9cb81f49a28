"""The section `quantize` of a configuration: the variants, their options and their limits."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.config.base import Section, Whole
from pipeline.config.calibration import DISTILLED_QUALITY, FAST_QUALITY, QUALITIES, Calibration, Distillation
from pipeline.config.catalog import (
    CALIBRATED,
    DEFAULT_VARIANTS,
    EIGHT_BITS,
    KEEP,
    ROUNDINGS,
    VARIANTS,
    Need,
    Variant,
)
from pipeline.config.limits import Gate, Target
from pipeline.config.presets import expand_aliases, names_to_choose


class VariantSpec(Section):
    """A variant: a name alone, or a mapping of these keys."""

    name: str = Field(description="name of a variant, or an alias")
    group_size: Whole | None = Field(default=None, description="columns that share a scale")
    rounding: str | None = Field(default=None, description="how weights are rounded")
    embeddings: Literal[KEEP, EIGHT_BITS] | None = Field(  # type: ignore[valid-type]  # the catalogue has the names
        default=None, description="embedding and output head: unchanged, or in 8 bits (the default of GGUF)"
    )
    packing: str | None = Field(
        default=None,
        description="how codes are stored: `plain` or `tile_packed` (int4), `compressed-tensors` or `torchao` (fp8)",
    )
    keep: list[str] = Field(default=[], description="layers to leave in bf16: full names, `*` and `?` allowed")
    int8: list[str] = Field(
        default=[], description="layers of int4 to store in 8 bits: full names, `*` and `?` allowed"
    )
    group_sizes: dict[Annotated[str, BeforeValidator(str)], list[str]] = Field(
        default={},
        exclude_if=lambda value: not value,
        description="other group sizes, each with its layers: full names, `*` and `?` allowed",
    )
    target: Target | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="what the variant must reach; needs calibration text",
    )
    gate: Gate = Field(default=Gate(), description="limits for this variant only; they override `quantize.gate`")

    @model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_the_catalog(self) -> VariantSpec:
        if self.name not in VARIANTS:
            raise ValueError(f"allowed are {names_to_choose(self.name)}")
        variant = self.variant
        options = [option for option in type(self).model_fields if option not in ("name", "gate")]
        if self.quantizer and (given := [option for option in options if getattr(self, option)]):
            way = f". Try: rounding: {variant.roundings[0]}" if variant.roundings else ""
            raise ValueError(
                f"{given[0]}: {self.name} is made by {self.quantizer}'s own quantizer, which takes none{way}"
            )
        allowed = ", ".join(map(str, variant.group_sizes)) or f"none, for {self.name} has no groups"
        if self.group_size is not None and self.group_size not in variant.group_sizes:
            raise ValueError(f"group_size {self.group_size}: allowed are {allowed}")
        if others := [size for size in self.group_sizes if size not in map(str, variant.group_sizes)]:
            raise ValueError(f"group_sizes {others[0]}: allowed are {allowed}")
        if self.group_sizes and variant.one_group_size:
            raise ValueError(f"group_sizes: all layers of {self.name} have the same group size. Try: group_size")
        if self.quantizes_embeddings and variant.keeps_embeddings:
            raise ValueError(
                f"embeddings int8: the engines that run {self.name} load no quantized embeddings. Try: embeddings: keep"
            )
        if self.quantizes_embeddings and not variant.roundings:
            raise ValueError(f"embeddings int8: {self.name} is not quantized")
        if self.rounding is not None and self.rounding not in variant.roundings:
            can = ", ".join(variant.roundings) or "none, because its format rounds by itself"
            raise ValueError(f"rounding {self.rounding!r}: allowed for {self.name} are {can}")
        if self.int8 and not self.mixes:
            raise ValueError("int8: layers in 8 bits go with int4 in its plain packing")
        if self.target and not self.mixes:
            can = ", ".join(name for name, other in VARIANTS.items() if any(p.mixes for p in other.packings.values()))
            raise ValueError(f"target: {self.name}, as it is packed, has the same bits in all layers. Try: {can}")
        if self.packing is not None and not variant.packings:
            raise ValueError(f"{self.name} is stored in one way and takes no packing")
        if self.packing is not None and self.packing not in variant.packings:
            raise ValueError(f"packing {self.packing!r}: allowed for {self.name} are {', '.join(variant.packings)}")
        return self

    @property
    def variant(self) -> Variant:
        """Its row of the catalogue."""
        return VARIANTS[self.name]

    @property
    def format(self) -> str:
        """The entry of `pipeline.quantization.formats` that writes it."""
        return self.variant.format_of(self.packing)

    @property
    def quantizer(self) -> str | None:
        """The library that quantizes it with its own settings; None if one of its roundings is named."""
        return None if self.rounding in self.variant.roundings else self.variant.quantizer

    @property
    def requires(self) -> tuple[tuple[str, str], ...]:
        """The (module, extra) of the optional packages that making it needs."""
        packing = self.variant.packing(self.packing)
        by_packing, by_quantizer = packing.requires if packing else (), self.variant.quantizer_requires
        return (*self.variant.requires, *by_packing, *(by_quantizer if self.quantizer else ()))

    @property
    def quantizes_embeddings(self) -> bool:
        """Return True if the embedding and the output head are stored in eight bits."""
        return self.embeddings == EIGHT_BITS

    @property
    def mixes(self) -> bool:
        """Return True if single layers can be stored in eight bits."""
        packing = self.variant.packing(self.packing)
        return packing is not None and packing.mixes

    def making(self) -> dict:
        """Return the settings that the files of the variant depend on, as plain data."""
        return self.model_dump(exclude={"gate", "target"} if self.int8 else {"gate", "target", EIGHT_BITS})

    def for_layer(self, name: str) -> VariantSpec:
        """Return the settings of one layer, which may have a group size of its own.

        Args:
            name: of its weight.
        """
        size = next((size for size, patterns in self.group_sizes.items() if matches(patterns, name)), None)
        return self if size is None else self.model_copy(update={"group_size": int(size)})

    def need(self, calibrates: bool) -> Need:
        """Return the statistics of the layers' inputs that it is rounded with."""
        rounding = ROUNDINGS.get(self.rounding or "")
        found = (rounding.uses if calibrates else rounding.needs) if rounding else Need.NOTHING
        return Need.RANGES if found == Need.NOTHING and self.variant.static_inputs else found

    @property
    def needing(self) -> str:
        """Return the name of what needs statistics of the layers' inputs."""
        return self.name if self.need(False) == Need.RANGES else f"rounding {self.rounding}"

    def resolved(self, quality: str = FAST_QUALITY) -> VariantSpec:
        """Return the variant with the defaults of the catalogue filled in.

        Args:
            quality: `quantize.quality`. The best one also calibrates eight bits, which gain little by it.
        """
        variant = self.variant
        if self.quantizer:
            return self
        default = next(iter(variant.roundings), None)
        pays = quality == DISTILLED_QUALITY or (quality != FAST_QUALITY and variant.has_few_bits)
        if pays and CALIBRATED in variant.roundings:
            default = CALIBRATED
        return self.model_copy(
            update={
                "group_size": self.group_size or variant.group_size,
                "rounding": self.rounding or default,
                "embeddings": self.embeddings or (None if self.target else variant.embeddings),
                "packing": self.packing or next(iter(variant.packings), None),
            }
        )


def matches(patterns: Collection[str], name: str) -> bool:
    """Return True if one of these patterns names the layer of a weight."""
    layer = name.removesuffix(".weight")
    wild = (pattern for pattern in patterns if any(mark in pattern for mark in "*?["))
    return layer in patterns or any(fnmatch.fnmatchcase(layer, pattern) for pattern in wild)


class Quantize(Section):
    """The variants to make, and their limits."""

    quality: Literal[*QUALITIES] = Field(  # type: ignore[valid-type]  # named once, above
        default=FAST_QUALITY,
        description="`calibrated` rounds with statistics of the layers' inputs, which is slower and loses less; "
        "`distilled` then trains the scales as well, which is slower still; by default `calibrated` after a training",
    )
    calibration: Calibration = Field(
        default=Calibration(),
        exclude_if=lambda value: value == Calibration(),
        description="text for `quality: calibrated` and `distilled`",
    )
    distillation: Distillation = Field(
        default=Distillation(),
        exclude_if=lambda value: value == Distillation(),
        description="training of the scales for `quality: distilled`",
    )
    variants: Annotated[
        list[VariantSpec],
        BeforeValidator(expand_aliases, json_schema_input_type=list[str | VariantSpec] | str | VariantSpec),
    ] = Field(
        default=[VariantSpec(name=name) for name in DEFAULT_VARIANTS],
        validate_default=True,
        description="names of variants or of presets such as `serving`, or mappings with options",
    )
    gate: Gate = Field(default=Gate(), description="limits for all variants; they override those of the catalogue")
    on_gate_failure: Literal["withhold", "warn"] = Field(
        default="withhold", description="what to do with a variant that misses its limits"
    )

    @field_validator("variants")
    @classmethod
    def _once_each(cls, value: list[VariantSpec], info: ValidationInfo) -> list[VariantSpec]:
        names = [v.name for v in value]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice} is asked for twice, by its own name, a preset or an alias. Try: name it once")
        return [v.resolved(info.data.get("quality", FAST_QUALITY)) for v in value]

    @model_validator(mode="after")
    def _calibration_fits(self) -> Quantize:
        for spec in self.variants:
            if not self.calibrates and spec.need(False) != Need.NOTHING:
                way = "quantize.quality=calibrated, or --calibration-text FILE"
                raise ValueError(f"{spec.needing}: needs calibration text. Try: {way}")
        if self.quality == DISTILLED_QUALITY and self.variants and not self.calibrated:
            names = ", ".join(spec.name for spec in self.variants)
            raise ValueError(
                f"quality {self.quality}: calibrates variants and trains their scales, and none of {names} can be "
                f"calibrated. Try: quality={FAST_QUALITY}, or a variant with its default rounding"
            )
        return self

    @property
    def calibrates(self) -> bool:
        """Return True if variants are calibrated."""
        return self.quality != FAST_QUALITY

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Return the names of the variants that are rounded with statistics of the layers' inputs."""
        return tuple(spec.name for spec in self.variants if spec.need(self.calibrates) != Need.NOTHING)

    @property
    def needs_ranges(self) -> bool:
        """Return True if a variant needs the ranges of the layers' inputs."""
        return any(spec.variant.static_inputs for spec in self.variants)

    @property
    def distilled(self) -> tuple[str, ...]:
        """Return the names of the variants whose scales are trained: those with few bits that a calibration rounds."""
        if self.quality != DISTILLED_QUALITY:
            return ()
        rounded = (spec for spec in self.variants if spec.need(True) == Need.GRAM_MATRIX)
        return tuple(spec.name for spec in rounded if spec.variant.has_few_bits)

    @property
    def targeted(self) -> tuple[str, ...]:
        """Return the names of the variants with a target."""
        return tuple(spec.name for spec in self.variants if spec.target)

    def spec(self, name: str) -> VariantSpec:
        """Return the variant of that name."""
        return next(v for v in self.variants if v.name == name)
