"""Stage `train`: fine-tuning of LoRA adapters on the linear layers of an NF4 or bf16 base.

`pipeline.data` makes tokens and loss masks, and trl runs the loop. NF4 uses double
quantization (QLoRA, Dettmers et al., 2023). The compute type is the one that is fast on this machine.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.schema import Config, TrainingRun
from pipeline.config.training_catalog import TRAINERS
from pipeline.errors import DataError, UserError
from pipeline.models.context import check_length, context_length
from pipeline.models.safe_loading import open_config, open_tokenizer
from pipeline.system import hardware
from pipeline.system.files import empty_folder, fingerprint, read_json, replace_folder
from pipeline.system.libraries import TRAINING, versions
from pipeline.tracking.events import Events
from pipeline.training.distributed import ProcessGroup, TrainingProcess, gather_adapter, sharding
from pipeline.training.lora_targets import check_targets
from pipeline.training.trainers import merge_bases
from pipeline.workflow.stages import Outcome, calibration_text
from pipeline.workflow.stages.inputs import base_model, hashes_of, keep_template, model_depends, without_limit
from pipeline.workflow.stages.quantize import check_variants
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


HELD_OUT_TOKENS = 8192  # for the held-out loss during training; a later stage measures the model on more


def parameters(config: TrainingRun, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {
        "model": config.model.source,
        "data": config.data.source,
        "method": config.train.method,
        "rank": config.train.lora.rank,
        "learning_rate": config.train.learning_rate,
        "epochs": config.train.epochs,
    }


def depends(config: TrainingRun, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    train = without_limit(config.train.model_dump(exclude={"checkpoint_every"}))
    return {
        "model": model_depends(config, workspace),
        "data": config.data.model_dump() | {"files": hashes_of(workspace, config.data.source)},
        **({"chat_template": hashes_of(workspace, chosen)} if (chosen := config.data.chat_template) else {}),
        "train": train,
        "versions": versions(*TRAINING),
        "python": platform.python_version() if config.data.source.startswith("builtin:") else None,
    }


def run(config: TrainingRun, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Train the adapter, or go on from the last checkpoint."""
    import torch
    from transformers import set_seed

    from pipeline.models.matrices import linear_weights
    from pipeline.system.libraries import quiet_progress_bars
    from pipeline.training.adapter_files import keep_beginning, save_adapter
    from pipeline.training.merge import check_mergeable, make_portable
    from pipeline.training.trainers import Job, trainer_module

    quiet_progress_bars()
    process = TrainingProcess.current()
    group = process.join_group()
    with group.local_main_first():
        prepared = _prepare(config, workspace, events, process)
        depends_on = fingerprint([depends(config, workspace, ()), prepared.content])
    if group.broadcast(depends_on) != depends_on:
        raise UserError(f"machine {process.machine}: its settings, data, model or libraries are not machine 0's")
    set_seed(config.train.seed)
    start = time.monotonic()
    compute_dtype = hardware.dtype_name(hardware.compute_dtype("cuda" if torch.cuda.is_available() else "cpu"))
    if compute_dtype == "float16":
        events.show(["computing in float16: this GPU has no bfloat16 instructions (compute capability below 8.0)"])
    checkpoints = _checkpoints(config, workspace, depends_on, process)
    plan, keep_plan = _time_plan(workspace, checkpoints)
    job = Job(
        checkpoints,
        process.size,
        events.progress,
        events.metrics,
        say=lambda line: events.show([line]),
        time_plan=plan,
        keep_time_plan=keep_plan,
    )
    lora, linear = config.train.lora, linear_weights(prepared.base)

    def build(settings: TrainingRun) -> Any:
        trainer = trainer_module(settings).build(settings, prepared.base, prepared.tokenizer, prepared.encoded, job)
        if process.is_main:
            untrained = cast("PeftModel", trainer.model)
            keep_beginning(untrained, lora, checkpoints)
            write = partial(save_adapter, untrained, lora=lora, checkpoints=checkpoints)
            check_mergeable(prepared.base, write, merge_bases(config), linear)
        return trainer

    trainer, resumed_from = _train_in_memory(build, config, workspace, events, checkpoints, group)
    model = cast("PeftModel", trainer.model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = gather_adapter(model)
    metric = TRAINERS[config.train.trainer].metric
    losses, held_out_losses, figures = (
        [row[key] for row in trainer.state.log_history if key in row] for key in ("loss", "eval_loss", metric)
    )
    if not all(map(math.isfinite, (*losses, *held_out_losses, *figures))):
        raise UserError(
            f"train.learning_rate {config.train.learning_rate}: training diverged, its loss is not a number; lower it"
        )
    best = trainer.state.best_metric if config.train.early_stopping else None
    if process.is_main:
        partial_folder = empty_folder(workspace.folder / "adapter.partial")
        save_adapter(model, partial_folder, lora, checkpoints, adapter)
        make_portable(partial_folder, workspace.read_measurement("origin")["hub_id"])
        replace_folder(partial_folder, workspace.adapter)
    summary = {
        "steps": trainer.state.global_step,
        "train_loss": sum(losses) / len(losses),
        "held_out_loss": best if best is not None else held_out_losses[-1] if held_out_losses else None,
        **_held_out_figures(config, trainer.state.log_history),
        "trainable_parameters": trainable,
        "seconds_training": round(time.monotonic() - start, 1),
        "compute_dtype": compute_dtype,
        "packing": getattr(trainer.args, "packing", False),
        **({"best_step": _step_of(trainer.state.best_model_checkpoint)} if best is not None else {}),
    }
    measured = {
        **summary,
        "resumed_from_step": resumed_from,
        "device": trainer.args.device.type,
        "processes": process.size,
        "history": [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row],
    }
    if not process.is_main:
        return Outcome((), summary)
    workspace.write_measurement("data", prepared.description)
    workspace.write_measurement("training", measured)
    measurements = (workspace.measurements / f"{name}.json" for name in ("origin", "data", "training"))
    return Outcome((workspace.adapter, workspace.data, *measurements), summary)


@dataclass(frozen=True)
class _Prepared:
    """The inputs of training.

    Attributes:
        base: folder of the base model.
        tokenizer: its tokenizer.
        encoded: the tokens of both splits.
        description: the description of the data.
        content: the fingerprint of the examples, and the commit or the digest of the base model.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    encoded: dict
    description: dict
    content: tuple[str, str]


def _prepare(config: TrainingRun, workspace: Workspace, events: Events, process: TrainingProcess) -> _Prepared:
    """Read the data, fetch the model, tokenize, and show what will be trained on.

    One process of each machine writes; the others read what it left.
    """
    from pipeline.data.chat import ChatTemplate, TemplateRefusal
    from pipeline.data.describe import CHOSEN_TEMPLATE, describe, report, samples
    from pipeline.data.system_prompt import set_prompt
    from pipeline.data.template_choice import choose_template
    from pipeline.evaluation import eligible_prompts, generation, texts
    from pipeline.evaluation.gates import ONE_CLUSTER
    from pipeline.models.matrices import linear_weights
    from pipeline.models.vocabulary_size import check_tokens, pad_within_embedding
    from pipeline.workflow.stages.training_data import encode_data, read_data

    events.progress(0, 1, "reading the data")  # first, since a bad row should not wait for a long download
    data, compared = read_data(config, workspace, process)
    base = base_model(config, workspace, events)
    check_variants(config, base)
    context = context_length(open_config(base).to_dict())
    check_length(config.train.max_length, context)
    check_targets(config.train.lora, linear_weights(base))
    tokenizer = open_tokenizer(base)
    pad_within_embedding(tokenizer, base)
    is_text = data.form == "text"  # which is learned as it is
    chosen = None if is_text else choose_template(tokenizer, config.data.chat_template)
    about_choice = {"template": CHOSEN_TEMPLATE, "chosen_digest": fingerprint(chosen)} if chosen else {}
    if config.data.system is not None:
        if is_text:
            raise DataError("data.system: plain text has no system prompt. Try: remove it")
        chosen = set_prompt(tokenizer, config.data.system)
    if process.is_local_main:
        keep_template(workspace, chosen)
    try:
        encoded = encode_data(config, data, tokenizer, events)
    except TemplateRefusal:  # a bad row like any other: refuse it with its place, or skip it
        data, compared = read_data(config, workspace, process, ChatTemplate(tokenizer).check)
        encoded = encode_data(config, data, tokenizer, events)
    if not encoded["training"].examples:
        longest = config.train.max_length
        raise UserError(f"train.max_length {longest}: leaves no answer in any example; make it larger")
    eligible_prompts.check_tokens(config, compared, tokenizer)
    held_out, general = encoded["held-out"].examples, texts.general(config, tokenizer, context)
    measured = {texts.HELD_OUT: texts.first_examples(config, data.held_out, held_out), texts.GENERAL: general}
    generation.check_prompts(config.evaluate.prompts, tokenizer, context)
    read = (*encoded["training"].examples, *held_out, *general)
    check_tokens(base, tokenizer, (sequence.input_ids for sequence in read))
    if process.is_local_main:
        calibration_text.check(config, workspace, base, tokenizer)
    description = describe(data, encoded, tokenizer) | about_choice
    alone = [ONE_CLUSTER[text] for text, part in measured.items() if len({s.cluster for s in part}) == 1]
    events.show(report(description, samples(data, encoded, tokenizer), config.data.system) + alone)
    watched = texts.first_examples(config, data.held_out, held_out, HELD_OUT_TOKENS)
    encoded["held-out"] = replace(encoded["held-out"], examples=watched)
    origin = workspace.read_measurement("origin")
    content = (data.fingerprint, origin["revision"] or origin["digest"])
    return _Prepared(base, tokenizer, encoded, description, content)


def _checkpoints(config: Config, workspace: Workspace, depends_on: str, process: TrainingProcess) -> Path:
    """Return the folder of this training's checkpoints, which are valid only for the same settings.

    The checkpoint of a sharded model counts only for the same number of processes.
    All machines use machine 0's folder, which lies beside their own.
    """
    from pipeline.training.checkpoints import is_complete

    run = workspace.folder.parent / config.name if process.machine else workspace.folder
    checkpoints = Workspace(run).checkpoints
    own = checkpoints / (f"{depends_on}-{sharding()}-{process.size}" if sharding() else depends_on)
    if not process.is_main:
        return own
    for other in checkpoints.glob("*"):
        if other != own:
            shutil.rmtree(other)
    for checkpoint in own.glob("checkpoint-*"):
        if not is_complete(checkpoint):
            shutil.rmtree(checkpoint)
    return own


def _time_plan(workspace: Workspace, checkpoints: Path) -> tuple[dict, Callable[[dict], None]]:
    """Return the plan of a stopped training with these checkpoints, and a function that records a new plan."""
    known = workspace.progress("train", "time_plan") if checkpoints.is_dir() else {}
    if known.get("checkpoints") != checkpoints.name:
        known = read_json(checkpoints / "time_plan.json", {})  # of an earlier release
    return known, lambda plan: workspace.note("train", time_plan={"checkpoints": checkpoints.name, **plan})


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


def _train(trainer: Any, checkpoints: Path, group: ProcessGroup) -> int | None:
    """Train to the end, and return the step of the checkpoint that training went on from, if there was one."""
    from transformers.trainer_utils import get_last_checkpoint

    from pipeline.training.checkpoints import restore_token_count

    found = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    last = group.broadcast(Path(found).name if found else None)
    if last and not (checkpoints / last / "trainer_state.json").is_file():
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


def _held_out_figures(config: TrainingRun, history: list[dict]) -> dict[str, float]:
    """Return the last figures of the trainer on held-out examples, beside their loss."""
    trainer = TRAINERS[config.train.trainer]
    measured = [row for row in history if trainer.metric in row]
    names = [name for name in (trainer.metric, *trainer.figures) if name != "eval_loss"]
    return {
        name.replace("eval_", "held_out_", 1): measured[-1][name] for name in names if measured and name in measured[-1]
    }


def _step_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def _just_evaluated(state: Any) -> bool:
    return any("eval_loss" in row and row["step"] == state.global_step for row in state.log_history)
