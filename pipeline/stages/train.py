"""Fine-tune: NF4 base (or bf16), LoRA on its linear layers, answers as the target.

Tokens and loss masks are made by `pipeline.data`, the loop is trl's. NF4 uses double
quantization and computes in bf16, on CUDA and on a CPU alike (QLoRA, Dettmers et al., 2023).
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.events import Events
from pipeline.libraries import versions
from pipeline.stages import Outcome
from pipeline.workspace import Workspace, empty_folder, replace_folder

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "tokenizers")


def parameters(config: Config, variant: str | None) -> dict:
    return {
        "model": config.model.source,
        "data": config.data.source,
        "method": config.train.method,
        "rank": config.train.lora.rank,
        "learning_rate": config.train.learning_rate,
        "epochs": config.train.epochs,
    }


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    train = config.train.model_dump(exclude={"checkpoint_every"})
    data_file = Path(config.data.source).expanduser()
    return {
        "model": config.model.model_dump() | {"files": workspace.hashes_of(Path(config.model.source).expanduser())},
        "data": config.data.model_dump() | {"files": workspace.hashes_of(data_file)},
        "train": train,
        "versions": versions(*LIBRARIES),
        "python": _python() if config.data.source.startswith("builtin:") else None,
    }


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    import torch
    from transformers import AutoTokenizer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from pipeline import texts
    from pipeline.data import load_examples, write_examples
    from pipeline.data.encode import encode_examples
    from pipeline.libraries import quiet_progress_bars
    from pipeline.models import fetch
    from pipeline.workspace import fingerprint

    quiet_progress_bars()
    settings = config.train
    events.progress(0, 1, "reading the data")  # first, since a bad row should not wait for a long download
    data = load_examples(config.data)
    workspace.data.mkdir(exist_ok=True)
    write_examples(workspace.data / "held_out.jsonl", data.held_out)
    events.progress(0, 1, "fetching the model")
    base, origin = fetch(config.model, workspace.base, lambda d, t: events.progress(d, t, "fetching the model"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = {
        name: encode_examples(
            examples,
            tokenizer,
            settings.loss_on,
            settings.max_length,
            lambda d, t, name=name: events.progress(d, t, f"tokenizing {name} examples"),
        )
        for name, examples in (("training", data.train), ("held-out", data.held_out))
    }
    if not encoded["training"].examples:
        raise UserError(f"train.max_length {settings.max_length}: leaves no answer in any example; make it larger")
    texts.both(config, workspace, tokenizer)  # too little to measure on should not be found out after training
    set_seed(settings.seed)
    start = time.monotonic()
    # A checkpoint counts only for the run it was made in.
    checkpoints = workspace.checkpoints / fingerprint(depends(config, workspace, ()))
    for other in workspace.checkpoints.glob("*"):
        if other != checkpoints:
            shutil.rmtree(other)
    for checkpoint in checkpoints.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").is_file():  # written last: without it the rest is not whole
            shutil.rmtree(checkpoint)
    trainer = _trainer(config, base, tokenizer, encoded, checkpoints, events)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if encoded["held-out"].examples and not _just_evaluated(trainer.state):
        trainer.evaluate()
    losses, held_out_losses = (
        [row[key] for row in trainer.state.log_history if key in row] for key in ("loss", "eval_loss")
    )
    if not all(map(math.isfinite, (*losses, *held_out_losses))):
        raise UserError(
            f"train.learning_rate {settings.learning_rate}: training diverged, its loss is not a number; lower it"
        )

    partial = empty_folder(workspace.folder / "adapter.partial")
    trainer.model.save_pretrained(partial)
    (partial / "README.md").unlink(missing_ok=True)  # peft's empty card; ours covers the adapter
    _portable_base(partial, origin.hub_id)
    replace_folder(partial, workspace.adapter)

    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    summary = {
        "steps": trainer.state.global_step,
        "train_loss": sum(losses) / len(losses),
        "held_out_loss": held_out_losses[-1] if held_out_losses else None,
        "trainable_parameters": trainable,
        "seconds_training": round(time.monotonic() - start, 1),
    }
    workspace.remember_base(base)
    workspace.write_measurement("data", _describe_data(data, encoded))
    measured = workspace.write_measurement(
        "training",
        {
            **summary,
            "resumed_from_step": int(last.rpartition("-")[2]) if last else None,
            "device": trainer.args.device.type,
            "dtype": "bfloat16",
            "history": [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row],
            "base": {
                "source": origin.source,
                "name": origin.name,
                "revision": origin.revision,
                "license": origin.license,
                "languages": list(origin.languages),
                "hub_id": origin.hub_id,
                "changes": origin.changes,
            },
            "torch_threads": torch.get_num_threads(),
        },
    )
    return Outcome((workspace.adapter, workspace.data, measured, workspace.measurements / "data.json"), summary)


def _trainer(config: Config, base: Path, tokenizer, encoded: dict, output: Path, events: Events):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from pipeline.nf4 import load_base

    settings, on_gpu = config.train, torch.cuda.is_available()
    model = load_base(base, settings.method == "qlora")
    datasets = {
        name: Dataset.from_dict(
            {"input_ids": [e.input_ids for e in part.examples], "labels": [e.labels for e in part.examples]}
        )
        for name, part in encoded.items()
        if part.examples
    }
    optimizer = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}.get(
        settings.optimizer, "paged_adamw_8bit" if on_gpu else "adamw_torch"
    )
    evaluation = datasets.get("held-out")
    args = SFTConfig(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        max_length=settings.max_length,
        packing=settings.packing,
        eval_packing=False,
        optim=optimizer,
        bf16=True,
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
    try:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=datasets["training"],
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[_reporter(events)],
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
    return trainer


def _reporter(events: Events):
    """Progress and figures of the loop, as events; trl's own integrations stay off."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            loss = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
            shown = f", loss {loss:.3f}" if loss is not None else ""
            events.progress(state.global_step, state.max_steps, f"step {state.global_step}/{state.max_steps}{shown}")

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
                events.metrics(values, state.global_step)

    return Reporter()


def _just_evaluated(state) -> bool:
    return any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)


def _describe_data(data, encoded: dict) -> dict:
    return {
        "source": data.source,
        "form": data.form,
        "rows": data.rows,
        "duplicates": data.duplicates,
        "fingerprint": data.fingerprint,
        "license": data.license,
        "language": data.language,
        "splits": {
            name: {
                "examples": len(part.examples),
                "tokens": part.tokens,
                "loss_tokens": part.loss_tokens,
                "truncated": part.truncated,
                "dropped": part.dropped,
            }
            for name, part in encoded.items()
        },
    }


def _portable_base(adapter: Path, hub_id: str | None) -> None:
    """peft writes the base model's path on this machine into the adapter; a Hub id or nothing belongs there."""
    import json

    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = hub_id
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _python() -> str:
    import platform

    return platform.python_version()
