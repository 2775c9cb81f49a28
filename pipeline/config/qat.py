"""The key `train.qat`: what it sets by default in other sections, and what it does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from pipeline.config.catalog import DEFAULT_VARIANTS, NEAREST, VARIANTS
from pipeline.config.presets import expand_aliases
from pipeline.config.training_catalog import ADAPTER, METHODS, TRAINERS
from pipeline.config.training_options import CONVERTED_BEGINNINGS

if TYPE_CHECKING:
    from pipeline.config.schema import Config


def _trained_for(name: str) -> str:
    """Return the name of a variant that weights can be trained for.

    Raises:
        ValueError: if there is no such variant, or its own library rounds it.
    """
    able = [other for other, variant in VARIANTS.items() if NEAREST in variant.roundings]
    if name in able:
        return name
    reason = "its library rounds it, which training cannot; " if name in VARIANTS else ""
    raise ValueError(f"{reason}allowed are {', '.join(able)}")


# The options of peft with which an adapter is still products of two factors on the unchanged base.
PLAIN_OPTIONS = (
    "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights",
)  # fmt: skip
TrainedFor = Annotated[str, AfterValidator(_trained_for)]


def with_qat(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, as plain data, with the defaults that `train.qat` needs: its rounding, and no dropout."""
    train, quantize = tree.get("train"), tree.get("quantize", {})
    if not isinstance(train, dict) or not isinstance(train.get("qat"), str) or not isinstance(quantize, dict):
        return tree
    adapter, variants = train.get(ADAPTER, {}), expand_aliases(quantize.get("variants", list(DEFAULT_VARIANTS)))
    if not isinstance(adapter, dict) or not isinstance(variants, list):
        return tree
    rounded = [
        item | {"rounding": item.get("rounding") or NEAREST}
        if isinstance(item, dict) and item.get("name") == train["qat"]
        else item
        for item in variants
    ]
    return tree | {
        "train": train | {ADAPTER: {"dropout": 0.0, **adapter}},
        "quantize": quantize | {"variants": rounded},
    }


def check_qat(config: Config) -> None:
    """Raise if another key contradicts `train.qat`.

    Raises:
        ValueError: naming the key.
    """
    name, train = config.train.qat, config.train
    if name is None:
        return
    if config.data is None:
        raise ValueError(f"train.qat {name}: nothing is trained. Try: leave out the key, or set data")
    spec = next((spec for spec in config.quantize.variants if spec.name == name), None)
    if spec is None:
        raise ValueError(f"train.qat {name}: is not among quantize.variants. Try: add it there")
    if spec.target:
        raise ValueError(f"train.qat {name}: its target would choose the bits after the training. Try: no target")
    if spec.rounding != NEAREST:
        raise ValueError(
            f"train.qat {name}: trains weights that are rounded with {NEAREST}, not {spec.rounding}. "
            f"Try: leave out rounding of {name}"
        )
    if train.lora.dropout:
        raise ValueError(
            f"train.lora.dropout {train.lora.dropout:g}: train.qat merges the adapter before each product, which "
            "leaves no input to drop. Try: train.lora.dropout=0"
        )
    options = train.lora.options
    more = [key for key in options if key not in PLAIN_OPTIONS]
    if more or options.get("init_lora_weights") in CONVERTED_BEGINNINGS:
        raise ValueError(
            f"train.lora.options {more[0] if more else 'init_lora_weights'}: train.qat trains plain LoRA on the "
            "unchanged base. Try: leave it out"
        )
    if not TRAINERS[train.trainer].quantizes:
        able = ", ".join(name for name, trainer in TRAINERS.items() if trainer.quantizes)
        raise ValueError(f"train.qat {name}: train.trainer {train.trainer} trains without it. Try: {able}")
    base = METHODS[train.method].merge_bases[0]
    if config.merge.base not in ("auto", base):
        raise ValueError(
            f"merge.base {config.merge.base}: train.qat trains the merge into the base that training sees. "
            f"Try: merge.base={base}"
        )
