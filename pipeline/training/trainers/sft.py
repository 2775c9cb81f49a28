"""trl's trainer with a run's settings, made to do in several processes what it does in one.

Each process takes every n-th batch, so a step sees the same examples in any number of processes. Where
the last step of an epoch does not go round, accelerate would repeat examples; here the rest is filled
with blanks, which have nothing that counts. The held-out loss is that of a counted token, over all
of them: it depends on no division into batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from pipeline.config.schema import Train, TrainingRun
from pipeline.config.training_catalog import METHODS
from pipeline.data.encode import EncodedSet
from pipeline.errors import UserError
from pipeline.system import hardware
from pipeline.training.accelerate_launch import share
from pipeline.training.callbacks import OnDisk, Reports
from pipeline.training.checkpoints import SafeCheckpoints
from pipeline.training.distributed import divided
from pipeline.training.even_batches import Filled, with_blanks
from pipeline.training.fused_loss import quicken_training
from pipeline.training.nf4_base import load_base
from pipeline.training.time_limit import TimeLimit
from pipeline.training.trainers import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build(
    config: TrainingRun, model: Path, tokenizer: PreTrainedTokenizerBase, data: dict[str, EncodedSet], job: Job
) -> SftTrainer:
    """Return the training loop of the base model in folder `model`, with its LoRA adapter in float32.

    Args:
        data: the tokens of the `training` and the `held-out` examples.

    Raises:
        UserError: if the model has none of the layers that are to be trained.
    """
    settings, on_gpu = config.train, torch.cuda.is_available()
    dtype = hardware.compute_dtype("cuda" if on_gpu else "cpu")
    batch_size, accumulate = share(config, job.processes)
    datasets = {
        name: Dataset.from_dict(
            {"input_ids": [e.input_ids for e in part.examples], "labels": [e.labels for e in part.examples]}
        )
        for name, part in data.items()
        if part.examples
    }
    optimizer = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}.get(
        settings.optimizer, "paged_adamw_8bit" if on_gpu and not divided() else "adamw_torch"
    )
    evaluation = datasets.get("held-out")
    args = SFTConfig(
        output_dir=str(job.output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        max_length=settings.max_length,
        packing=settings.packing,
        eval_packing=False,
        optim=optimizer,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        eval_strategy="steps" if evaluation is not None else "no",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        logging_steps=1,
        logging_first_step=True,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_pin_memory=on_gpu,
    )
    lora = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=settings.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    # After the arguments, which prepare a model's way to be divided while it loads.
    base = load_base(model, METHODS[settings.method].in_nf4, divided() is not None)
    try:
        trainer = SftTrainer(
            model=base,
            args=args,
            train_dataset=datasets["training"],
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Reports(job.progress, job.metrics), *_time_limit(settings, data, job), OnDisk()],
        )
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise
        raise UserError(
            f"train.lora.target_modules {settings.lora.target_modules}: the model has no such layers"
        ) from None
    # trl puts a 4-bit model's adapter into bf16, where small updates are rounded away, and a resumed
    # one is in float32 again: then it would not be the same training.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not on_gpu and not divided():
        quicken_training(trainer.model, dtype)
    return trainer


def _time_limit(settings: Train, encoded: dict[str, EncodedSet], job: Job) -> list[TimeLimit]:
    if settings.max_minutes is None:
        return []
    held_out = sum(len(example.input_ids) for example in encoded["held-out"].examples)
    examples = encoded["training"].examples
    # Packed sequences are full; others are as long as their examples, which are shorter than `max_length`.
    length = settings.max_length if settings.packing else sum(len(e.input_ids) for e in examples) / len(examples)
    steps = held_out / (length * settings.batch_size * settings.accumulate)
    return [TimeLimit(settings.max_minutes, steps, job.time_plan, job.keep_time_plan)]


class SftTrainer(SafeCheckpoints, SFTTrainer):
    """Takes token ids and labels, as `pipeline.data` makes them."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self._examples, self._blanks, processes = len(self.train_dataset), 0, self.accelerator.num_processes
        if processes == 1:
            return
        self._blanks = -self._examples % (self.args.per_device_train_batch_size * processes)
        self.train_dataset = with_blanks(self.train_dataset, min(self._blanks, 1))
        if self.eval_dataset is not None:
            together = self.args.per_device_eval_batch_size * processes
            self.eval_dataset = with_blanks(self.eval_dataset, -len(self.eval_dataset) % together)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        if not self._blanks:
            return super()._get_train_sampler(train_dataset)
        # The order that accelerate gives an ordinary sampler, and after it the blank, which lies at the end.
        order = SeedableRandomSampler(range(self._examples), data_seed=self.args.data_seed)
        return Filled(order, [self._examples] * self._blanks)

    def _run_epoch(self, **settings):  # it has no other name
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**settings)
        else:  # by itself it takes a step more where it goes on from the checkpoint of the last one
            self.control.should_training_stop = True

    def evaluation_loop(self, *arguments, **settings):
        self._loss_of_all, self._counted = 0.0, 0
        output = super().evaluation_loop(*arguments, **settings)
        prefix = settings.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = float(self._loss_of_all / self._counted)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            counted = self._get_num_items_in_batch([inputs], self.args.device)  # in all processes
            # As in training, the mean over processes is the loss of a token.
            loss = self.compute_loss(model, inputs, num_items_in_batch=counted).detach()
        self._loss_of_all += float(self.accelerator.reduce(loss.clone(), "mean") * counted)
        self._counted += int(counted)
        return loss, None, None
