"""One training of an adapter, or of all weights: from its last checkpoint to its files and figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.schema import TrainingRun
from pipeline.config.training_catalog import TRAINERS
from pipeline.data.encode import EncodedSet
from pipeline.errors import UserError
from pipeline.system import hardware
from pipeline.system.files import empty_folder, read_json, replace_folder
from pipeline.tracking.events import Events
from pipeline.training.distributed import ProcessGroup, TrainingProcess, gather_adapter
from pipeline.training.trainers import merge_bases
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

UNSTABLE = ("resumed_from_step", "device", "processes", "history", "preference")  # not for the ledger and events


@dataclass(frozen=True)
class Work:
    """What all trainings of a run share.

    Attributes:
        base: folder of the base model.
        tokenizer: its tokenizer.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    workspace: Workspace
    events: Events
    group: ProcessGroup
    process: TrainingProcess


def fine_tune(
    config: TrainingRun,
    work: Work,
    encoded: dict[str, EncodedSet],
    checkpoints: Path,
    output: Path,
    start: Path | None = None,
    plot: Callable[[dict[str, float], int], None] | None = None,
) -> dict[str, Any]:
    """Train an adapter or all weights, or go on from the last checkpoint, and write the result.

    Args:
        encoded: the tokens of the `training` and the `held-out` examples.
        checkpoints: folder of its checkpoints.
        output: folder of the result.
        start: the adapter that training goes on with; None for a new adapter.
        plot: called with figures and their step; by default they are events.

    Returns:
        The figures of the training, as plain data.

    Raises:
        UserError: if training diverges, or its settings do not work.
    """
    import torch
    from transformers import PreTrainedModel, set_seed

    from pipeline.models.matrices import linear_weights
    from pipeline.training.adapter_files import keep_beginning, save_adapter
    from pipeline.training.merge import check_mergeable, make_portable
    from pipeline.training.trainers import Job, trainer_module

    began, workspace, events, process = time.monotonic(), work.workspace, work.events, work.process
    lora, adapts, linear = config.train.lora, config.train.adapts, linear_weights(work.base)

    def build(settings: TrainingRun) -> Any:
        set_seed(config.train.seed)
        plan, keep_plan = _time_plan(workspace, checkpoints)
        job = Job(
            checkpoints,
            process.size,
            events.progress,
            plot or events.metrics,
            say=lambda line: events.show([line]),
            time_plan=plan,
            keep_time_plan=keep_plan,
            start=start,
        )
        trainer = trainer_module(settings).build(settings, work.base, work.tokenizer, encoded, job)
        if process.is_main:
            untrained = cast("PeftModel", trainer.model)
            if adapts:
                keep_beginning(untrained, lora, checkpoints)
                write = partial(save_adapter, untrained, lora=lora, checkpoints=checkpoints)
                check_mergeable(work.base, write, merge_bases(config), linear)
            else:  # as large as the model, so not among the system's temporary files
                write = partial(PreTrainedModel.save_pretrained, cast(PreTrainedModel, trainer.model))
                check_mergeable(work.base, write, (), (), whole=True, within=workspace.folder)
        return trainer

    trainer, resumed_from = _train_in_memory(build, config, workspace, events, checkpoints, work.group)
    model, history = cast("PeftModel", trainer.model), trainer.state.log_history
    metric = TRAINERS[config.train.trainer].metric
    losses, held_out_losses, figures = (
        [row[key] for row in history if key in row] for key in ("loss", "eval_loss", metric)
    )
    if not all(map(math.isfinite, (*losses, *held_out_losses, *figures))):
        raise UserError(
            f"train.learning_rate {config.train.learning_rate}: training diverged, its loss is not a number; lower it"
        )
    best = trainer.state.best_model_checkpoint if config.train.early_stopping else None
    best_step = _step_of(best) if best else None
    # The figures of the result that is kept.
    of_kept = (row for row in reversed(history) if best_step in (None, row["step"]))
    measured: dict[str, float] = next((row for row in of_kept if "eval_loss" in row or metric in row), {})
    shards = gather_adapter(model)
    if process.is_main:
        partial_folder = empty_folder(output.with_name(f"{output.name}.partial"))
        if adapts:
            save_adapter(model, partial_folder, lora, checkpoints, shards)
            make_portable(partial_folder, workspace.read_measurement("origin")["hub_id"])
        else:
            model.save_pretrained(str(partial_folder))
        replace_folder(partial_folder, output)
    preference = _figures_on_pairs(config, trainer.state.global_step, losses, measured)
    return {
        "steps": trainer.state.global_step,
        "train_loss": sum(losses) / len(losses),
        "held_out_loss": measured.get("eval_loss"),
        **(
            {metric.replace("eval_", "held_out_", 1): measured[metric]} if metric in {*measured} - {"eval_loss"} else {}
        ),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds_training": round(time.monotonic() - began, 1),
        "compute_dtype": hardware.dtype_name(hardware.compute_dtype("cuda" if torch.cuda.is_available() else "cpu")),
        "packing": getattr(trainer.args, "packing", False),
        **({"best_step": best_step} if best_step is not None else {}),
        "resumed_from_step": resumed_from,
        "device": trainer.args.device.type,
        "processes": process.size,
        **({"preference": preference} if preference else {}),
        "history": [row for row in history if "loss" in row or "eval_loss" in row],
    }


def _train_in_memory(
    build: Callable[[TrainingRun], Any],
    config: TrainingRun,
    workspace: Workspace,
    events: Events,
    checkpoints: Path,
    group: ProcessGroup,
) -> tuple[Any, int | None]:
    """Train; if a batch does not fit into the GPU's memory, go on with smaller batches of the same global batch.

    Returns:
        The training loop, and the step of the checkpoint that it went on from, if there was one.

    Raises:
        UserError: if a single sequence does not fit, or several processes train together.
    """
    import gc

    import torch

    known = workspace.progress("train", "fitting_batch")
    fitting = known.get("batch_size") if known.get("checkpoints") == checkpoints.name else None
    settings = with_batch_size(config, fitting) if fitting else config
    while True:
        try:
            trainer = build(settings)
            return trainer, _train(trainer, checkpoints, group)
        except torch.OutOfMemoryError:
            size = settings.train.batch_size
            if size == 1 or TrainingProcess.current().size > 1:
                raise UserError(
                    f"train.batch_size {size}: does not fit into the GPU's memory. "
                    f"Try: --set train.max_length={max(1, config.train.max_length // 2)}"
                ) from None
        trainer = None  # its memory comes back before the next one is built
        gc.collect()
        torch.cuda.empty_cache()
        settings = with_batch_size(config, largest_part(config.train.batch_size, size))
        train = settings.train
        workspace.note("train", fitting_batch={"checkpoints": checkpoints.name, "batch_size": train.batch_size})
        events.show(
            [
                f"train.batch_size {size}: does not fit into the GPU's memory; going on with {train.batch_size}, "
                f"and train.accumulate {train.accumulate}, which is the same global batch"
            ]
        )


def largest_part(whole: int, below: int) -> int:
    """Return the largest divisor of a number that is smaller than another one."""
    return next(part for part in range(below - 1, 0, -1) if whole % part == 0)


def with_batch_size(config: TrainingRun, size: int) -> TrainingRun:
    """Return a configuration with smaller batches, a divisor of the present size, and the same global batch."""
    train = config.train
    update = {"batch_size": size, "accumulate": train.accumulate * (train.batch_size // size)}
    return config.model_copy(update={"train": train.model_copy(update=update)})


def _time_plan(workspace: Workspace, checkpoints: Path) -> tuple[dict, Callable[[dict], None]]:
    """Return the plan of a stopped training with these checkpoints, and a function that records a new plan."""
    known = workspace.progress("train", "time_plan") if checkpoints.is_dir() else {}
    if known.get("checkpoints") != checkpoints.name:
        known = read_json(checkpoints / "time_plan.json", {})  # of an earlier release
    return known, lambda plan: workspace.note("train", time_plan={"checkpoints": checkpoints.name, **plan})


def _train(trainer: Any, checkpoints: Path, group: ProcessGroup) -> int | None:
    """Train to the end, and return the step of the checkpoint that training went on from, if there was one."""
    from transformers.trainer_utils import get_last_checkpoint

    from pipeline.training.checkpoints import TRAINER_STATE, restore_token_count

    found = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    last = group.broadcast(Path(found).name if found else None)
    if last and not (checkpoints / last / TRAINER_STATE).is_file():
        raise UserError(f"{checkpoints / last}: machine 0 goes on from this checkpoint, which is not to be seen here; "
                        "all machines need the same runs folder")  # fmt: skip
    if last:
        restore_token_count(trainer, checkpoints / last)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoints / last) if last else None)
    except UnpicklingError:  # of FSDP's files, which are opened with `weights_only`
        broken = checkpoints / (last or "")
        raise UserError(f"{broken}: damaged, or contains more than numbers. Try: remove it") from None
    if trainer.eval_dataset is not None and not _just_evaluated(trainer.state):
        trainer.evaluate()
    return _step_of(last) if last else None


def _figures_on_pairs(config: TrainingRun, steps: int, losses: list[float], measured: dict) -> dict[str, Any]:
    """Return the figures of a measurement on preference pairs, each with its error; nothing for other data."""
    if "eval_reward_margin" not in measured:
        return {}
    names = {
        "accuracy": "preference_accuracy",
        "margin": "reward_margin",
        "likelier": "likelier",
        "likelier_gain": "likelier_gain",
    }
    figures = {
        ours: {"value": measured[f"eval_{name}"], "stderr": measured.get(f"eval_{name}_stderr")}
        for ours, name in names.items()
    }
    return {
        "trainer": config.train.trainer,
        "steps": steps,
        "train_loss": sum(losses) / len(losses),
        "held_out_loss": measured["eval_loss"],
        **figures,
    }


def _step_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def _just_evaluated(state: Any) -> bool:
    return any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)
