"""Configurations from command-line options: for quantizing a model, or for merging an adapter.

    quantize_config("user/model", "out", ["int8", "int4"])
    merge_config("user/model", "./adapter", "out")

`pipeline.workflow.run.run(config, output="out")` runs them, with the same events, cards and ledger.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.calibration import CALIBRATED_QUALITY, FAST_QUALITY
from pipeline.config.catalog import VARIANTS
from pipeline.config.limits import Target
from pipeline.config.loader import parse_config
from pipeline.config.presets import expand, names_to_choose
from pipeline.config.quantize import VariantSpec
from pipeline.config.schema import Config
from pipeline.errors import ConfigError


def quantize_config(
    source: str,
    output: str | Path,
    variants: list[str],
    group_size: int | None = None,
    rounding: str | None = None,
    measure: bool = False,
    revision: str | None = None,
    settings: Sequence[str] = (),
    packing: str | None = None,
    low_disk: bool = False,
    target: dict | None = None,
) -> Config:
    """Return a configuration that makes variants of a full-precision model, and nothing else.

    Args:
        source: Hub id, or folder.
        output: folder of the run; its name is the name of the run.
        variants: names or aliases.
        group_size: columns that share a scale, for the variants that `variant_specs` chooses.
        rounding: the rounding, for variants that take it.
        measure: measure the model and its variants.
        revision: branch, tag or commit on the Hub.
        settings: `key=value` for other keys of a configuration.
        packing: the packing, for variants that take it.
        low_disk: fetch and quantize one shard at a time, then remove the shard.
        target: what variants must reach, for those with different bits by layer.

    Raises:
        ConfigError: naming the option and the allowed values.
    """
    specs = variant_specs(variants, group_size, rounding, packing, target=target)
    more = {"model": {"source": source, "revision": revision, "low_disk": True}} if low_disk else {}
    return _config(source, output, specs, measure, revision, more, settings)


def merge_config(
    base: str,
    adapter: str,
    output: str | Path,
    kind: str = "auto",
    variants: list[str] | None = None,
    measure: bool = False,
    revision: str | None = None,
    settings: Sequence[str] = (),
) -> Config:
    """Return a configuration that merges an adapter that was trained elsewhere, and makes variants of the result.

    Args:
        base: Hub id, or folder, of the model that the adapter was trained on.
        adapter: Hub id, or folder.
        output: folder of the run; its name is the name of the run.
        kind: base to merge into: `bf16`, `auto` for the same, or `nf4` for the weights that QLoRA training saw.
        variants: names or aliases.
        measure: measure the models.
        revision: branch, tag or commit of the base on the Hub.
        settings: `key=value` for other keys of a configuration.

    Raises:
        ConfigError: naming the option and the allowed values.
    """
    merge = {"base": kind, "adapter": adapter}
    return _config(base, output, variant_specs(variants or []), measure, revision, {"merge": merge}, settings)


def _config(
    source: str,
    output: str | Path,
    specs: list[dict],
    measure: bool,
    revision: str | None,
    more: dict,
    settings: Sequence[str],
) -> Config:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(output).resolve().name).lstrip("._-")[:96]
    tree = {
        "name": name or "model",
        "model": {"source": source, "revision": revision},
        "data": None,
        "evaluate": {} if measure else None,
        "quantize": {"variants": specs},
        **more,
    }
    return parse_config(tree, "options", settings)


def calibration_settings(
    quality: str | None, texts: Sequence[str], tokens: int | None = None, targeted: bool = False
) -> dict[str, Any]:
    """Return keys of a configuration for options of the calibration. With a text, variants are calibrated by default.

    Args:
        quality: value of `--quality`.
        texts: values of `--calibration-text`.
        tokens: value of `--calibration-tokens`.
        targeted: a variant has a target, which needs a text whatever the quality.

    Raises:
        ConfigError: if there is no text where one is needed, or one that nothing uses.
    """
    if texts and quality is None:
        quality = CALIBRATED_QUALITY
    if texts and quality == FAST_QUALITY and not targeted:
        raise ConfigError(
            f"--calibration-text {texts[0]}: not used with --quality {quality}. Try: --quality {CALIBRATED_QUALITY}"
        )
    if tokens is not None and not texts:
        raise ConfigError(f"--calibration-tokens {tokens}: there is no text. Try: --calibration-text FILE.txt")
    settings = {
        "quantize.quality": quality,
        "quantize.calibration.source": list(texts) or None,
        "quantize.calibration.tokens": tokens,
    }
    return {key: value for key, value in settings.items() if value is not None}


def read_target(text: str, option: str = "target") -> dict[str, float]:
    """Return a target such as `rise=0.03` as `quantize.variants[].target` takes it.

    Args:
        option: the option that errors name.

    Raises:
        ConfigError: if it is written in another way.
    """
    key, _, value = text.partition("=")
    if key not in Target.model_fields or not re.fullmatch(r"\d*\.?\d+", value):
        raise ConfigError(f"--{option} {text}: not a target. Try: rise=0.03, size_mb=500 or bits=4.8")
    return {key: float(value)}


def variant_specs(
    variants: list[str],
    group_size: int | None = None,
    rounding: str | None = None,
    packing: str | None = None,
    option: str = "--variants",
    target: dict | None = None,
) -> list[dict]:
    """Return variants as `quantize.variants` takes them.

    `rounding`, `packing` and `target` go to the variants that take them. `group_size` goes to the variants that have
    groups by default, or to all if none has, but not to variants with only one size.

    Args:
        variants: names, aliases or presets, separated by commas.
        group_size: columns that share a scale.
        rounding: name of a rounding.
        packing: name of a packing.
        option: the option that errors name.
        target: what variants with different bits by layer must reach.

    Raises:
        ConfigError: for an unknown name, or an option that no variant takes.
    """
    try:
        chosen = expand(variants)
    except KeyError as unknown:
        raise ConfigError(f"{option} {unknown.args[0]}: allowed are {names_to_choose(unknown.args[0])}") from None
    names = [item["name"] for item in chosen]
    sized = [name for name in names if group_size in VARIANTS[name].group_sizes] or names
    choosing = [name for name in sized if len(VARIANTS[name].group_sizes) > 1] or sized
    in_groups = [name for name in choosing if VARIANTS[name].group_size] or choosing
    rounded = [name for name in names if rounding in VARIANTS[name].roundings]
    packed = [name for name in names if packing in VARIANTS[name].packings]
    mixed = [name for name in names if VariantSpec(name=name, packing=packing if name in packed else None).mixes]
    if target and names and not mixed:
        (key, value), *_ = target.items()
        can = [name for name in VARIANTS if VariantSpec(name=name).mixes]
        advice = f"leave out --packing {packing}" if set(can) & set(packed) else f"{option} {', '.join(can)}"
        raise ConfigError(f"--target {key}={value:g}: {', '.join(names)} cannot have a target. Try: {advice}")
    for option, value, takers in (("rounding", rounding, rounded), ("packing", packing, packed)):
        if value is not None and names and not takers:
            known = dict.fromkeys(one for name in names for one in getattr(VARIANTS[name], f"{option}s"))
            advice = ", ".join(known) or f"leave out --{option}"
            raise ConfigError(f"--{option} {value}: none of {', '.join(names)} takes it. Try: {advice}")
    specs = []
    for item in chosen:
        name = item["name"]
        options: dict[str, object] = {"group_size": group_size if name in in_groups else None}
        options["rounding"] = rounding if name in rounded else None
        options["packing"] = packing if name in packed else None
        options["target"] = target if name in mixed else None
        specs.append(item | {key: value for key, value in options.items() if value is not None})
    return specs
