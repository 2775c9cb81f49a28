"""The section of a configuration about fine-tuning.

A key at its default is left out of files and fingerprints if an earlier version did not have it, so that its runs stay
valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Rate, Real, Section, Seed
from pipeline.config.data import Data
from pipeline.config.qat import TrainedFor
from pipeline.config.training_catalog import (
    DEFAULT_ON_PAIRS,
    DEFAULT_TRAINER,
    METHODS,
    SMALLEST_METHOD,
    TRAINERS,
    Trainer,
    on_pairs,
)
from pipeline.config.training_options import (
    CONVERTED_BEGINNINGS,
    LORA_FIXED,
    LORA_KEYS,
    PLAIN_BEGINNINGS,
    TRAINER_FIXED,
    TRAINER_KEYS,
    check_names,
)


def _is(default: object) -> Callable[[object], bool]:
    """Return a function that tells if a value is this default."""
    return lambda value: value == default


def _names_and_purposes(trainers: Iterable[Trainer]) -> str:
    """Return the names of trainers and what they do."""
    return ", ".join(f"`{trainer.name}` {trainer.about}" for trainer in trainers)


class Lora(Section):
    """The LoRA adapter."""

    rank: Count = Field(default=16, description="rank of the two matrices of each layer")
    alpha: Real = Field(default=32, gt=0, description="scale of the adapter: its product is times alpha / rank")
    dropout: Real = Field(default=0.05, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        default="all-linear", description="`all-linear`, a list of module names, or a regular expression"
    )
    options: dict[str, Any] = Field(
        default={}, exclude_if=_is({}), description="further fields of `peft.LoraConfig`, such as `use_dora: true`"
    )

    @field_validator("options")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_names("train.lora.options", value, LORA_KEYS, LORA_FIXED)
        begin = value.get("init_lora_weights", True)
        if begin not in (*PLAIN_BEGINNINGS, *CONVERTED_BEGINNINGS):
            known = ", ".join(str(one).lower() for one in (*PLAIN_BEGINNINGS, *CONVERTED_BEGINNINGS))
            raise ValueError(f"init_lora_weights {begin} cannot be merged or resumed. Try: {known}")
        return value

    @field_validator("target_modules")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not names or "lm_head" in names:
            raise ValueError("'all-linear' or a list of module names; lm_head cannot be trained here")
        if isinstance(value, str):  # peft takes a text for a pattern
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"no regular expression ({error}); write module names as a list") from None
        return value


class Preference(Section):
    """A second training of the same adapter, on preference pairs.

    All other settings are those of the first; only `max_minutes` and `early_stopping` do not hold for it.
    """

    data: Data = Field(description="preference pairs")
    trainer: str = Field(default=DEFAULT_ON_PAIRS, description="kind of training: " + _names_and_purposes(on_pairs()))
    epochs: Real = Field(default=1, gt=0, le=1000, description="passes over the pairs")
    max_steps: Count | None = Field(default=None, description="stop after this many optimizer steps")
    batch_size: Count = Field(default=4, description="pairs in one forward pass")
    accumulate: Count = Field(default=4, description="forward passes for one optimizer step")
    learning_rate: Rate = Field(default=5.0e-5, description="highest learning rate")
    options: dict[str, Any] = Field(
        default={}, description="further fields of trl's configuration class, such as `beta: 0.1`"
    )

    @field_validator("data")
    @classmethod
    def _data(cls, value: Data) -> Data:
        for key in ("chat_template", "template_options", "system"):
            if getattr(value, key) != Data.model_fields[key].default:
                raise ValueError(f"{key}: both trainings use the chat template of the first. Try: data.{key}")
        return value

    @field_validator("trainer")
    @classmethod
    def _trainer(cls, value: str) -> str:
        able = [trainer.name for trainer in on_pairs()]
        if value not in able:
            raise ValueError(f"{value!r} does not train on preference pairs; allowed are {', '.join(able)}")
        return value

    @field_validator("options")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_names("train.preference.options", value, TRAINER_KEYS, TRAINER_FIXED)
        return value


class Train(Section):
    """Fine-tuning."""

    trainer: str = Field(
        default=DEFAULT_TRAINER,
        exclude_if=_is(DEFAULT_TRAINER),
        description="kind of fine-tuning: " + _names_and_purposes(TRAINERS.values()),
    )
    method: Literal[*METHODS] = Field(  # type: ignore[valid-type]  # the catalogue has the names
        default=SMALLEST_METHOD.name,
        description="train an adapter on a base in 4 bits (NF4) or in bf16, or all weights",
    )
    lora: Lora = Field(default=Lora(), description="the adapter")
    epochs: Real = Field(default=1, gt=0, le=1000, description="passes over the training examples")
    max_steps: Count | None = Field(default=None, description="stop after this many optimizer steps")
    max_minutes: Real | None = Field(
        default=None, gt=0, le=100_000, description="train as many steps as fit in this time"
    )
    batch_size: Count = Field(default=4, description="sequences in one forward pass")
    accumulate: Count = Field(default=4, description="forward passes for one optimizer step")
    learning_rate: Rate = Field(default=2.0e-4, description="highest learning rate")
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="how the learning rate changes after the warm-up"
    )
    warmup: Real = Field(default=0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    max_length: Count = Field(
        default=1024, description="tokens in one training sequence, at most the model's context; longer ones are cut"
    )
    packing: bool = Field(
        default=True, description="put several short examples into one sequence, if the model keeps them apart"
    )
    loss_on: Literal["auto", "assistant", "completion", "all"] = Field(
        default="auto", description="tokens that count: all answers, the last answer, or the whole text"
    )
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = Field(
        default="auto", description="`auto` takes the 8-bit one on CUDA"
    )
    weight_decay: Real = Field(default=0, ge=0, le=1, exclude_if=_is(0), description="decay of the trained weights")
    max_grad_norm: Real = Field(
        default=1, ge=0, exclude_if=_is(1), description="longest gradient of a step; longer ones are scaled, 0 for none"
    )
    early_stopping: Count | None = Field(
        default=None,
        exclude_if=_is(None),
        description="stop after this many measurements without a lower held-out loss, and take the best checkpoint",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        exclude_if=_is(None),
        description="compute activations again instead of keeping them; by default on a GPU only",
    )
    attention: Literal["auto", "eager", "sdpa", "flash"] = Field(
        default="auto", exclude_if=_is("auto"), description="attention kernel; `flash` needs CUDA and flash-attn"
    )
    liger: bool = Field(default=False, exclude_if=_is(False), description="use Liger kernels, on CUDA")
    compile: bool = Field(default=False, exclude_if=_is(False), description="compile the model, on CUDA")
    checkpoint_every: Count = Field(default=100, description="steps between two checkpoints")
    keep_checkpoints: Count = Field(default=2, exclude_if=_is(2), description="checkpoints to keep")
    evaluate_every: Count = Field(default=100, description="steps between two measurements of the held-out loss")
    preference: Preference | None = Field(
        default=None, exclude_if=_is(None), description="a second training of the adapter on preference pairs"
    )
    seed: Seed = Field(default=0, description="seed of the adapter's first weights and of the order of examples")
    qat: TrainedFor | None = Field(
        default=None,
        exclude_if=_is(None),
        description="variant to train for: each step computes with the weights that this variant will store",
    )
    options: dict[str, Any] = Field(
        default={},
        exclude_if=_is({}),
        description="further fields of trl's configuration class, such as `neftune_noise_alpha: 5`",
    )

    @field_validator("options")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_names("train.options", value, TRAINER_KEYS, TRAINER_FIXED)
        return value

    @property
    def adapts(self) -> bool:
        """Return True if an adapter is trained, and not the model's own weights."""
        return METHODS[self.method].adapts

    @property
    def unused_remark(self) -> str | None:
        """Return a remark about settings that have no effect; None if all have one."""
        if self.adapts or self.lora == Lora():
            return None
        return f"train.lora: has no effect, since train.method {self.method} trains all weights"

    @property
    def packs(self) -> bool:
        """Return True if examples are to be packed, and the trainer can do it."""
        return self.packing and TRAINERS[self.trainer].packs

    @field_validator("trainer")
    @classmethod
    def _trainer(cls, value: str) -> str:
        if value not in TRAINERS:
            raise ValueError(f"{value!r} is no trainer; allowed are {', '.join(TRAINERS)}")
        return value

    @model_validator(mode="after")
    def _best_is_kept(self) -> Train:
        if self.early_stopping and self.checkpoint_every != self.evaluate_every:
            raise ValueError(
                f"early_stopping: checkpoint_every {self.checkpoint_every} is not evaluate_every "
                f"{self.evaluate_every}, so the best step may have no checkpoint. "
                f"Try: checkpoint_every={self.evaluate_every}"
            )
        return self

    @model_validator(mode="after")
    def _whole_model_alone(self) -> Train:
        """Refuse what needs an adapter if the method trains none."""
        needs = {
            f"trainer={self.trainer}": TRAINERS[self.trainer].needs_adapter,
            "preference": self.preference is not None,
            "qat": self.qat is not None,
            "lora.options": bool(self.lora.options),
        }
        asked = next((key for key, is_set in needs.items() if is_set), None)
        if asked and not self.adapts:
            able = " or ".join(f"method={name}" for name, method in METHODS.items() if method.adapts)
            raise ValueError(f"method {self.method}: trains no adapter, which {asked} needs. Try: {able}")
        return self
