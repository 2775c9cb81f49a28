"""trl's trainer with a run's settings, made to do in several processes what it does in one.

Each process takes every n-th batch, so a step sees the same examples in any number of processes. Where
the last step of an epoch does not go round, accelerate would repeat examples; here the rest is filled
with blanks, which have nothing that counts. The held-out loss is that of a counted token, over all
of them: it depends on no division into batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from pipeline.config.schema import Config, Train
from pipeline.data.encode import NO_LOSS, EncodedSet
from pipeline.errors import UserError
from pipeline.system import hardware
from pipeline.system.files import sync_all, write_text
from pipeline.training.accelerate_launch import share
from pipeline.training.fused_layers import quicken_training
from pipeline.training.nf4_base import load_base
from pipeline.training.resume_state import load_state, random_state, save_state, set_random_state
from pipeline.training.time_limit import TimeLimit

TRAINING_STATE = "training_state.safetensors"  # in a checkpoint: the optimizer and the schedule

ON_DISK = "on-disk"  # a file in a checkpoint that is written when all others were on the disk


def new_trainer(
    config: Config,
    base: Path,
    tokenizer,
    encoded: dict[str, EncodedSet],
    output: Path,
    processes: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    metrics: Callable[[dict[str, float], int], None] = lambda values, step: None,
) -> Trainer:
    """A trainer of the base model in folder `base`, its LoRA adapter in float32, with the run's settings.

    Args:
        encoded: the examples of `training` and of `held-out` as tokens.
        output: folder of its checkpoints.
        progress: called with how much is done, of how much, and what.
        metrics: called with figures to plot and their step.
        processes: how many train together.

    Raises:
        UserError: where the model has none of the layers that are to be trained.
    """
    settings, on_gpu = config.train, torch.cuda.is_available()
    dtype = hardware.compute_dtype("cuda" if on_gpu else "cpu")
    batch_size, accumulate = share(config, processes)
    datasets = {
        name: Dataset.from_dict(
            {"input_ids": [e.input_ids for e in part.examples], "labels": [e.labels for e in part.examples]}
        )
        for name, part in encoded.items()
        if part.examples
    }
    optimizer = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}.get(
        settings.optimizer, "paged_adamw_8bit" if on_gpu and not divided() else "adamw_torch"
    )
    evaluation = datasets.get("held-out")
    args = SFTConfig(
        output_dir=str(output),
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
    model = load_base(base, settings.method == "qlora", divided() is not None)
    try:
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=datasets["training"],
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[_Reports(progress, metrics), *_time_limit(settings, encoded), _OnDisk()],
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


def _time_limit(settings: Train, encoded: dict[str, EncodedSet]) -> list[TimeLimit]:
    if settings.max_minutes is None:
        return []
    held_out = sum(len(example.input_ids) for example in encoded["held-out"].examples)
    examples = encoded["training"].examples
    # Packed sequences are full; others are as long as their examples, which are shorter than `max_length`.
    length = settings.max_length if settings.packing else sum(len(e.input_ids) for e in examples) / len(examples)
    return [TimeLimit(settings.max_minutes, held_out / (length * settings.batch_size * settings.accumulate))]


class Trainer(SFTTrainer):
    """Takes token ids and labels, as `pipeline.data` makes them."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self._examples, self._blanks, processes = len(self.train_dataset), 0, self.accelerator.num_processes
        if processes == 1:
            return
        self._blanks = -self._examples % (self.args.per_device_train_batch_size * processes)
        self.train_dataset = _with_blanks(self.train_dataset, min(self._blanks, 1))
        if self.eval_dataset is not None:
            together = self.args.per_device_eval_batch_size * processes
            self.eval_dataset = _with_blanks(self.eval_dataset, -len(self.eval_dataset) % together)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        if not self._blanks:
            return super()._get_train_sampler(train_dataset)
        # The order that accelerate gives an ordinary sampler, and after it the blank, which lies at the end.
        order = SeedableRandomSampler(range(self._examples), data_seed=self.args.data_seed)
        return _Filled(order, [self._examples] * self._blanks)

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

    # Checkpoints hold no pickles, as transformers' own would; what divides a model writes and reads its own kind.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if divided():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            state = {"optimizer": self.optimizer.state_dict(), "schedule": self.lr_scheduler.state_dict()}
            save_state(Path(output_dir) / TRAINING_STATE, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if divided():
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            state = load_state(Path(checkpoint) / TRAINING_STATE)
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["schedule"])

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the leader may not have come to it yet
        save_state(self._random_numbers(output_dir), random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._random_numbers(checkpoint).is_file():  # or there were fewer processes
            set_random_state(load_state(self._random_numbers(checkpoint)))

    def _random_numbers(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"random_state_{self.args.process_index}.safetensors"


class _Filled(Sampler):
    """Another sampler's order, and then some more."""

    def __init__(self, sampler: SeedableRandomSampler, more: list[int]):
        self._sampler, self._more = sampler, more

    def __len__(self) -> int:
        return len(self._sampler) + len(self._more)

    def __iter__(self) -> Iterator[int]:
        yield from self._sampler
        yield from self._more

    def set_epoch(self, epoch: int) -> None:
        self._sampler.set_epoch(epoch)


def _with_blanks(dataset, count: int):
    """A data set with so many examples at its end in which no token counts."""
    if not count:
        return dataset
    token = dataset[0]["input_ids"][0]
    blank = {"input_ids": [token, token], "labels": [NO_LOSS, NO_LOSS], "seq_lengths": [2]}
    columns = {name: [blank[name]] * count for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])


def count_on(trainer: Trainer, checkpoint: Path) -> None:
    """Have the tokens be counted on from where a checkpoint was written; trl begins anew at nothing."""
    rows = json.loads((checkpoint / "trainer_state.json").read_bytes())["log_history"]
    seen = next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), 0)
    trainer._total_train_tokens = seen  # it has no other name


def divided() -> str | None:
    """What divides the model, its gradients or its optimizer among the processes, if anything does."""
    from accelerate.utils import parse_flag_from_env

    kinds = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((kind for kind, variable in kinds.items() if parse_flag_from_env(variable)), None)


def whole_adapter(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The trained weights by name, put together where each process holds a part; every process must ask.

    None where they lie whole in the model.
    """
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if divided() == "fsdp":
        return {name: p.full_tensor().detach().cpu() for name, p in trained.items()}
    if divided() == "deepspeed":
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}
    return None


class _OnDisk(TrainerCallback):
    """Has each checkpoint on the disk before the next step, and then says so in it.

    The trainer leaves that to the system, and after a power cut its files may be there with nothing in them.
    """

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync_all(checkpoint)
            write_text(checkpoint / ON_DISK, "")


class _Reports(TrainerCallback):
    """Progress and figures of the loop, as events; trl's own integrations stay off."""

    def __init__(self, progress: Callable, metrics: Callable):
        self._progress, self._metrics, self._batches = progress, metrics, 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._batches += 1
        self._progress(self._batches, len(eval_dataloader), "held-out loss")

    def on_evaluate(self, args, state, control, **kwargs):
        self._batches = 0

    def on_step_end(self, args, state, control, **kwargs):
        loss = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
        shown = f", loss {loss:.3f}" if loss is not None else ""
        self._progress(state.global_step, state.max_steps, f"step {state.global_step}/{state.max_steps}{shown}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        values = {}
        for key, value in (logs or {}).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                # `loss` is a step's, `train_loss` the mean at the end: not a point of the same curve.
                split, _, name = key.partition("_") if key.startswith("eval_") else ("train", "", key)
                values[f"{split}/{'mean_loss' if name == 'train_loss' else name.removeprefix('train_')}"] = value
        if values:
            self._metrics(values, state.global_step)
