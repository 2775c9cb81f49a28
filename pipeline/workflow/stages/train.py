"""Stage `train`: fine-tuning of LoRA adapters on the linear layers of an NF4 or bf16 base, or of all weights.

`pipeline.data` makes tokens and loss masks, and trl runs the loop. NF4 uses double
quantization (QLoRA, Dettmers et al., 2023). The compute type is the one that is fast on this machine.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config, Data, TrainingRun
from pipeline.data.sources import is_builtin
from pipeline.errors import DataError, UserError
from pipeline.models.checkpoint_files import ADAPTER_FILES
from pipeline.models.context import check_length, context_length
from pipeline.models.safe_loading import open_config, open_tokenizer
from pipeline.system import hardware
from pipeline.system.files import fingerprint
from pipeline.system.libraries import TRAINING, versions
from pipeline.tracking.events import Events
from pipeline.training.distributed import TrainingProcess, sharding
from pipeline.training.lora_targets import check_targets
from pipeline.workflow.stages import Outcome, calibration_text
from pipeline.workflow.stages.fine_tune import UNSTABLE, Work, fine_tune
from pipeline.workflow.stages.inputs import base_model, hashes_of, keep_template, model_depends, without_limit
from pipeline.workflow.stages.quantize import check_variants
from pipeline.workflow.stages.training_data import HELD_OUT_PAIRS, Pairs, read_pairs
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BEFORE_PREFERENCE = "adapter-before-preference"  # folder in the workspace
HELD_OUT_TOKENS = 8192  # for the held-out loss during training; a later stage measures the model on more


def parameters(config: TrainingRun, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {
        "model": config.model.source,
        "data": config.data.named,
        "method": config.train.method,
        **({"rank": config.train.lora.rank} if config.train.adapts else {}),
        "learning_rate": config.train.learning_rate,
        "epochs": config.train.epochs,
    }


def depends(config: TrainingRun, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    train = without_limit(config.train.model_dump(exclude={"checkpoint_every", "keep_checkpoints"}))
    first, second = _files(config.data, workspace), None
    if config.train.preference:
        second = _files(config.train.preference.data, workspace)
    named = config.train.qat  # its settings decide how weights are rounded in training
    return {
        "model": model_depends(config, workspace),
        "data": config.data.model_dump() | {"files": _of_source(first)},
        **({"chat_template": hashes_of(workspace, chosen)} if (chosen := config.data.chat_template) else {}),
        "train": train,
        **({"qat": config.quantize.spec(named).making()} if named else {}),
        "versions": versions(*TRAINING),
        **({"pairs": _of_source(second)} if second else {}),
        "python": platform.python_version() if any(map(is_builtin, (*first, *(second or ())))) else None,
    }


def _files(data: Data, workspace: Workspace) -> dict[str, dict[str, str]]:
    """Return the hashes of the files of each source of a data set."""
    return {part.source: hashes_of(workspace, part.source) for part in data.all_parts}


def _of_source(files: dict[str, dict[str, str]]) -> dict:
    """Return the hashes of a single source without its name, as earlier versions did."""
    return files if len(files) > 1 else next(iter(files.values()))


def run(config: TrainingRun, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Train, or go on from the last checkpoint."""
    import torch

    from pipeline.system.libraries import quiet_progress_bars

    quiet_progress_bars()
    process = TrainingProcess.current()
    group = process.join_group()
    with group.local_main_first():
        prepared = _prepare(config, workspace, events, process)
        first = config.model_copy(update={"train": config.train.model_copy(update={"preference": None})})
        depends_on = fingerprint([depends(first, workspace, ()), prepared.content])
        pairs = prepared.pairs
        second = pairs and fingerprint([depends_on, pairs.content, config.train.model_dump()["preference"]])
    if group.broadcast(depends_on) != depends_on:
        raise UserError(f"machine {process.machine}: its settings, data, model or libraries are not machine 0's")
    if hardware.compute_dtype("cuda" if torch.cuda.is_available() else "cpu") == torch.float16:
        events.show(["computing in float16: this GPU has no bfloat16 instructions (compute capability below 8.0)"])
    work = Work(prepared.base, prepared.tokenizer, workspace, events, group, process)
    if config.train.unused_remark:
        events.show([config.train.unused_remark])
    checkpoints = _checkpoints(config, workspace, process, depends_on, *([second] if second else []))
    output = workspace.adapter if config.train.adapts else workspace.trained
    if pairs:
        measured = _first_step(config, work, prepared, checkpoints[0])
        measured["preference"] = _second_step(config, work, pairs, checkpoints[1], measured["steps"])
    else:
        measured = fine_tune(config, work, prepared.encoded, checkpoints[0], output)
    summary = {key: value for key, value in measured.items() if key not in UNSTABLE}
    if not process.is_main:
        return Outcome((), summary)
    workspace.write_measurement("data", prepared.description)
    workspace.write_measurement("training", measured)
    measurements = (workspace.measurements / f"{name}.json" for name in ("origin", "data", "training"))
    return Outcome((output, workspace.data, *measurements), summary)


def _first_step(config: TrainingRun, work: Work, prepared: _Prepared, checkpoints: Path) -> dict:
    """Train the adapter that preference training goes on with, unless it is there already; return its figures."""
    folder, name = work.workspace.folder / BEFORE_PREFERENCE, checkpoints.name
    known = work.workspace.progress("train", "first_step")
    if known.get("checkpoints") == name and (folder / ADAPTER_FILES[1]).is_file():
        return work.workspace.read_measurement("first_training")
    measured = fine_tune(config, work, prepared.encoded, checkpoints, folder)
    work.workspace.write_measurement("first_training", measured)
    work.workspace.note("train", first_step={"checkpoints": name})
    return measured


def _second_step(config: TrainingRun, work: Work, pairs: Pairs, checkpoints: Path, steps: int) -> dict:
    """Train the adapter on preference pairs; return the figures.

    Args:
        steps: steps of the first training; the curves go on after them.
    """
    second, start = config.preference_run(), work.workspace.folder / BEFORE_PREFERENCE

    def plot(values: dict[str, float], step: int) -> None:
        work.events.metrics({f"preference/{name}": value for name, value in values.items()}, steps + step)

    return dict(fine_tune(second, work, pairs.encoded, checkpoints, work.workspace.adapter, start, plot)["preference"])


@dataclass(frozen=True)
class _Prepared:
    """The inputs of training.

    Attributes:
        base: folder of the base model.
        tokenizer: its tokenizer.
        encoded: the tokens of both splits.
        description: the description of the data.
        content: the fingerprint of the examples, and the commit or the digest of the base model.
        pairs: the preference pairs of `train.preference`.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    encoded: dict
    description: dict
    content: tuple[str, str]
    pairs: Pairs | None = None


def _prepare(config: TrainingRun, workspace: Workspace, events: Events, process: TrainingProcess) -> _Prepared:
    """Read the data, fetch the model, tokenize, and show what will be trained on.

    One process of each machine writes; the others read what it left.
    """
    from pipeline.data.chat import ChatTemplate, TemplateRefusal
    from pipeline.data.describe import CHOSEN_TEMPLATE, describe, report, samples
    from pipeline.data.system_prompt import set_prompt
    from pipeline.data.template_choice import choose_template
    from pipeline.data.template_options import set_options
    from pipeline.evaluation import eligible_prompts, generation, texts
    from pipeline.evaluation.gates import ONE_CLUSTER
    from pipeline.models.matrices import linear_weights
    from pipeline.models.vocabulary_size import check_tokens, pad_within_embedding
    from pipeline.training.qat import check_model, trained_for
    from pipeline.workflow.stages.training_data import encode_data, read_data

    events.progress(0, 1, "reading the data")  # first, since a bad row should not wait for a long download
    data, compared = read_data(config, workspace, process)
    base = base_model(config, workspace, events)
    check_variants(config, base)
    if spec := trained_for(config):
        check_model(spec, base)
        events.show([f"train.qat: each step computes with the weights that {spec.name} will store, without dropout"])
    context = context_length(open_config(base).to_dict())
    check_length(config.train.max_length, context)
    if config.train.adapts:
        check_targets(config.train.lora, linear_weights(base))
    tokenizer = open_tokenizer(base)
    pad_within_embedding(tokenizer, base)
    is_text = data.form == "text"  # which is learned as it is
    chosen = None if is_text else choose_template(tokenizer, config.data.chat_template)
    about_choice = {"template": CHOSEN_TEMPLATE, "chosen_digest": fingerprint(chosen)} if chosen else {}
    if is_text and config.data.template_options:
        raise DataError("data.template_options: plain text needs no chat template. Try: remove it")
    if config.data.template_options:
        chosen = set_options(tokenizer, config.data.template_options)
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
    check_tokens(base, tokenizer, (sequence.input_ids for example in read for sequence in example.sequences))
    if process.is_local_main:
        calibration_text.check(config, workspace, base, tokenizer)
    description = describe(data, encoded, tokenizer) | about_choice
    alone = [ONE_CLUSTER[text] for text, part in measured.items() if len({s.cluster for s in part}) == 1]
    events.show(report(description, samples(data, encoded, tokenizer), config.data.system) + alone)
    are_pairs = any(example.rejected for example in held_out)
    few = texts.first_examples(config, data.held_out, held_out, HELD_OUT_TOKENS)
    encoded["held-out"] = replace(encoded["held-out"], examples=held_out[:HELD_OUT_PAIRS] if are_pairs else few)
    origin = workspace.read_measurement("origin")
    content = (data.fingerprint, origin["revision"] or origin["digest"])
    pairs = None
    if config.train.preference:
        pairs = read_pairs(config, workspace, process, tokenizer, events, data.held_out)
        check_tokens(
            base, tokenizer, (s.input_ids for p in pairs.encoded.values() for e in p.examples for s in e.sequences)
        )
        description["preference"] = pairs.description
    return _Prepared(base, tokenizer, encoded, description, content, pairs)


def _checkpoints(config: Config, workspace: Workspace, process: TrainingProcess, *steps: str) -> list[Path]:
    """Return the folder of the checkpoints of each training, which are valid only for the same settings.

    The checkpoint of a sharded model counts only for the same number of processes.
    All machines use machine 0's folder, which lies beside their own.

    Args:
        steps: the fingerprint of each training.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from pipeline.training.checkpoints import find_best_checkpoint, is_complete

    run = workspace.folder.parent / config.name if process.machine else workspace.folder
    checkpoints = Workspace(run).checkpoints
    own = [checkpoints / (f"{step}-{sharding()}-{process.size}" if sharding() else step) for step in steps]
    if not process.is_main:
        return own
    for other in checkpoints.glob("*"):
        if other not in own:
            shutil.rmtree(other)
    for folder in own:
        for checkpoint in folder.glob("checkpoint-*"):
            if not is_complete(checkpoint):
                shutil.rmtree(checkpoint)
        if folder.is_dir() and (last := get_last_checkpoint(str(folder))):
            find_best_checkpoint(Path(last))
    return own
