"""Trainers: kinds of fine-tuning. A trainer is one module, and one row in `training_catalog.TRAINERS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from pipeline.config.catalog import DATA_FORMS, PREFERENCE
from pipeline.config.schema import Config, TrainingRun
from pipeline.config.training_catalog import METHODS, TRAINERS, UNCHANGED_BASE
from pipeline.errors import DataError

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.encode import EncodedSet


@dataclass(frozen=True)
class Job:
    """The work of one process of a training.

    Attributes:
        output: folder of the checkpoints.
        processes: the number of processes that train together.
        progress: called with how much is done, of how much, and what.
        metrics: called with figures to plot and their step.
        say: called with a line to show.
        time_plan: the last recorded plan, if this training was stopped (`training.time_limit`).
        keep_time_plan: records the steps that fit into `train.max_minutes`, and the used time.
        start: folder of the adapter that training goes on with; None for a new adapter.
    """

    output: Path
    processes: int = 1
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    metrics: Callable[[dict[str, float], int], None] = lambda values, step: None
    say: Callable[[str], None] = lambda line: None
    time_plan: Mapping[str, float] = field(default_factory=dict)
    keep_time_plan: Callable[[dict[str, float]], None] = lambda plan: None
    start: Path | None = None


class Trainer(Protocol):
    """The module of a trainer."""

    def build(
        self,
        config: TrainingRun,
        model: Path,
        tokenizer: PreTrainedTokenizerBase,
        data: dict[str, EncodedSet],
        job: Job,
    ) -> transformers.Trainer:
        """Return the training loop for the base model in folder `model`, with a peft adapter if the method has one.

        Args:
            data: the tokens of the `training` and the `held-out` examples.

        Raises:
            UserError: if this model cannot be trained with these settings.
        """


def trainer_module(config: TrainingRun) -> Trainer:
    """Import and return the module of the trainer that a configuration names."""
    return cast(Trainer, importlib.import_module(TRAINERS[config.train.trainer].module))


def options_class(trainer: str) -> type:
    """Import and return the class that has the fields of `train.options` for this trainer."""
    module, _, name = TRAINERS[trainer].options.partition(":")
    return cast(type, getattr(importlib.import_module(module), name))


def check_form(config: TrainingRun, form: str) -> None:
    """Check that the configured trainer takes data of this form.

    Raises:
        DataError: naming the forms that it takes.
    """
    forms = TRAINERS[config.train.trainer].forms
    if form not in forms and (form in DATA_FORMS or forms == (PREFERENCE,)):
        others = [f"train.trainer={name}" for name, trainer in TRAINERS.items() if form in trainer.forms]
        if form == PREFERENCE:  # the better answer alone
            others.append("data.columns={completion: chosen}, or {messages: chosen} for whole conversations")
        raise DataError(
            f"{config.data.named}: has the form {form}, and train.trainer {config.train.trainer} takes only "
            f"{', '.join(forms)}. Try: {' or '.join(others) or 'another data set'}"
        )


def merge_bases(config: Config) -> tuple[str, ...]:
    """Return the bases that the adapter is merged into; if there are several, they are compared.

    It is not known on which base an adapter from elsewhere was trained. Such an adapter is merged into the unchanged
    base, as is usual.
    """
    if config.merge.base != "auto":
        return (config.merge.base,)
    if not isinstance(config, TrainingRun):
        return (UNCHANGED_BASE,)
    possible = METHODS[config.train.method].merge_bases
    found = tuple(base for base in possible if base in TRAINERS[config.train.trainer].merge_bases)
    return found[:1] if config.train.qat else found  # the merge into the base that training saw is what was trained
