"""Options that a configuration passes on to trl and peft, checked with the installed classes.

A configuration class that the pipeline does not know, or a field of a later version, needs no change here.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.config.catalog import PREFERENCE
from pipeline.config.loader import cut
from pipeline.config.schema import TrainingRun
from pipeline.config.training_catalog import METHODS, TRAINERS
from pipeline.config.training_options import (
    CONVERTED_BEGINNINGS,
    LORA_FIXED,
    LORA_KEYS,
    TRAINER_FIXED,
    TRAINER_KEYS,
)
from pipeline.errors import ConfigError
from pipeline.training.trainers import options_class


def check_options(config: TrainingRun) -> None:
    """Check `train.options` and `train.lora.options` with the installed classes, before a model is loaded.

    Raises:
        ConfigError: naming an unknown option, the nearest known one, or the value that is refused.
    """
    train = config.train
    _check_trainer("train.options", train.trainer, train.options)
    if train.preference:
        _check_trainer("train.preference.options", train.preference.trainer, train.preference.options)
    if train.lora.options:
        from peft import LoraConfig

        owned = {*LORA_KEYS, *LORA_FIXED}
        _check("train.lora.options", LoraConfig, train.lora.options, owned, lambda: LoraConfig(**train.lora.options))
        begin = train.lora.options.get("init_lora_weights")
        alone = PREFERENCE in TRAINERS[train.trainer].forms
        moved = "init_lora_weights" if alone and begin in CONVERTED_BEGINNINGS else None
        if (alone or train.preference) and train.lora.options.get("bias", "none") != "none":
            moved = "bias"
        if moved:
            raise ConfigError(
                f"train.lora.options.{moved} {train.lora.options[moved]}: it changes the base model, which training on "
                f"preference pairs takes as the reference. Try: train.lora.options without {moved}"
            )
        if begin in CONVERTED_BEGINNINGS and METHODS[train.method].in_nf4:
            raise ConfigError(
                f"train.lora.options.init_lora_weights {begin}: it splits the base's own weights, which "
                f"train.method {train.method} holds in 4 bits. Try: --set train.method=lora"
            )


def _check_trainer(section: str, trainer: str, options: dict[str, Any]) -> None:
    if options:
        kind, around = options_class(trainer), {"output_dir": "", "report_to": [], "use_cpu": True}
        _check(section, kind, options, {*TRAINER_KEYS, *TRAINER_FIXED}, lambda: kind(**around, **options))


def _check(section: str, kind: type, options: dict[str, Any], owned: set[str], make: Callable[[], object]) -> None:
    known = {field.name for field in fields(kind)} - owned
    types = typing.get_type_hints(kind)
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{section}: {kind.__name__} has no option {cut(name)!r}; {_nearest(name, known)}")
        _check_type(f"{section}.{name}", types[name], value)
    try:
        make()
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"{section}: {kind.__name__} refuses them: {cut_reason(error)}") from None


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "see its documentation for the names"


def _check_type(key: str, annotation: Any, value: Any) -> None:
    """Raise if a value does not have the annotated type; numbers are not taken from texts."""
    if annotation is float and type(value) is int:
        return
    try:
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        reasons = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()[:2]))
        raise ConfigError(f"{key}: {cut(str(value))} is refused: {reasons}") from None


def cut_reason(error: Exception) -> str:
    """Return the first 200 characters of an error's text in one line."""
    line = " ".join(str(error).split())
    return line if len(line) <= 200 else line[:197] + "..."
