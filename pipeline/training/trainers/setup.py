"""What all trainers share: arguments of the training loop, the adapter, the base model, and callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, GenerationConfig, TrainerCallback

from pipeline.config.schema import Lora, Train, TrainingRun
from pipeline.config.training_catalog import METHODS
from pipeline.data.encode import EncodedSet
from pipeline.errors import UserError
from pipeline.system import hardware
from pipeline.training.accelerate_launch import split_step
from pipeline.training.callbacks import ProgressReporter, SyncCheckpoints
from pipeline.training.distributed import sharding
from pipeline.training.fused_loss import fuse_training_step
from pipeline.training.nf4_base import load_base
from pipeline.training.options import cut_reason
from pipeline.training.qat import quantize_in_training, trained_for
from pipeline.training.time_limit import TimeLimit
from pipeline.training.trainers import Job

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ATTENTION = {"auto": None, "flash": "flash_attention_2"}  # names of transformers that differ from ours


def common_arguments(config: TrainingRun, job: Job, measures: bool) -> dict[str, Any]:
    """Return the arguments that every configuration class of transformers and trl takes.

    Args:
        measures: True if there are held-out examples.
    """
    settings, on_gpu = config.train, torch.cuda.is_available()
    dtype = hardware.compute_dtype("cuda" if on_gpu else "cpu")
    batch_size, accumulate = split_step(config, job.processes)
    optimizer = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}.get(
        settings.optimizer, "paged_adamw_8bit" if on_gpu and not sharding() else "adamw_torch"
    )
    best = settings.early_stopping is not None
    if best and not measures:
        raise UserError("train.early_stopping: no held-out example is left to measure. Try: a larger data.held_out")
    checkpointing = settings.gradient_checkpointing
    return {
        "output_dir": str(job.output),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,  # below 1 it is a share of all steps
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "max_length": settings.max_length,
        "optim": optimizer,
        "bf16": dtype == torch.bfloat16 and (on_gpu or not settings.adapts),  # fused layers need no autocast
        "fp16": on_gpu and dtype == torch.float16,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": on_gpu if checkpointing is None else checkpointing,
        "torch_compile": settings.compile,
        "use_liger_kernel": settings.liger,
        "eval_strategy": "steps" if measures else "no",
        "eval_steps": settings.evaluate_every,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_every,
        "save_total_limit": settings.keep_checkpoints,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None,
        "restore_callback_states_from_checkpoint": best,  # which count measurements
        "logging_steps": 1,
        "logging_first_step": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "dataloader_pin_memory": on_gpu,
    }


def lora_config(settings: Lora) -> LoraConfig:
    """Return the settings of the adapter as peft takes them."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft also takes fractions
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
        **settings.options,
    )


def load_for_training(config: TrainingRun, model: Path) -> PreTrainedModel:
    """Return the base model in folder `model` as the configuration's method holds it."""
    method, attention = METHODS[config.train.method], ATTENTION.get(config.train.attention, config.train.attention)
    dtype = torch.bfloat16 if method.adapts else torch.float32  # trained weights would lose small updates in bf16
    base = load_base(model, method.in_nf4, sharding() is not None, attention, dtype)
    if not method.adapts:  # transformers may refuse to write the base's own, and the release has that file anyway
        base.generation_config = GenerationConfig()
    return base


def common_callbacks(settings: Train, packing: bool, data: dict[str, EncodedSet], job: Job) -> list[TrainerCallback]:
    """Return the callbacks of every training loop.

    Args:
        packing: True if examples are packed.
        data: the tokens of the `training` and the `held-out` examples.
    """
    callbacks: list[TrainerCallback] = [ProgressReporter(job.progress, job.metrics), SyncCheckpoints()]
    if settings.early_stopping:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping))
    if settings.max_minutes is not None:
        examples, held_out = (_lengths(data[split]) for split in ("training", "held-out"))
        # Packed sequences have `max_length` tokens; others are as long as their examples.
        length = settings.max_length if packing else sum(examples) / len(examples)
        steps = sum(held_out) / (length * settings.batch_size * settings.accumulate)
        callbacks.append(TimeLimit(settings.max_minutes, steps, job.time_plan, job.keep_time_plan))
    return callbacks


def _lengths(part: EncodedSet) -> list[int]:
    """Return the tokens of each example; of a preference pair those of both sequences."""
    return [sum(len(sequence.input_ids) for sequence in example.sequences) for example in part.examples]


def prepare_adapted(adapted: PeftModel, config: TrainingRun, model: Path, mean_logits: bool = False) -> None:
    """Hold the trained weights in float32, use fused layers and a fused loss on a CPU, and quantize if asked to.

    trl holds the adapter of a 4-bit model in bf16, which rounds small updates away. A resumed adapter is in float32, so
    the resumed training would differ.

    Args:
        adapted: the base model with an untrained adapter.
        model: folder of the base model.
        mean_logits: see `fuse_training_step`.
    """
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    on_gpu = torch.cuda.is_available()
    dtype = hardware.compute_dtype("cuda" if on_gpu else "cpu")
    if not on_gpu and not sharding():
        fuse_training_step(adapted, dtype, mean_logits)
    if spec := trained_for(config):
        quantize_in_training(adapted, spec, model, dtype)


@contextmanager
def naming_refused_settings(settings: Train) -> Iterator[None]:
    """Turn what trl and peft refuse while they build a training loop into one line that names the key."""
    try:
        yield
    except ValueError as error:
        reason = str(error)
        if "target modules" in reason.lower():
            reason = "the model has no such layers"
        elif "target_modules" not in reason:
            keys = [
                key
                for key, said in (("train.options", settings.options), ("train.lora.options", settings.lora.options))
                if said
            ]
            if not keys:
                raise
            named = " or ".join(keys)
            raise UserError(f"{named}: refused: {cut_reason(error)}. Try: other values, or without {named}") from None
        raise UserError(f"train.lora.target_modules {settings.lora.target_modules}: {reason}") from None
