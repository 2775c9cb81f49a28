"""The merge of an adapter into a base model, in one pass over its files: W + scale * B @ A, in bf16.

Weights that were trained as a whole are rounded to bf16 in the same way.
Variants of the merged model can be written in the same pass.

QLoRA training sees dequantized NF4 weights, so there are two bases to merge into: the original one, and the NF4 one.
The stage `pipeline.workflow.stages.merge` measures which one is better.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.models.chat_templates import DEFAULT, chat_templates, write_chat_templates
from pipeline.models.checkpoint import SHARD_BYTES, Checkpoint, CheckpointWriter
from pipeline.models.checkpoint.row_blocks import (
    Job,
    Take,
    are_finite,
    blocks_of,
    in_disk_order,
    in_parallel,
    row_blocks,
    tiles,
)
from pipeline.models.checkpoint_files import ADAPTER_FILES, copy_companions, read_config
from pipeline.models.lora_adapter import Adapter
from pipeline.models.safe_loading import open_config, read_settings
from pipeline.models.tensor_names import open_checkpoint
from pipeline.quantization.writer import VariantFiles, Variants
from pipeline.training.nf4_base import Nf4Weight, row_multiple


def merge_checkpoint(
    base: Path,
    trained: Path,
    output: Path,
    kind: str,
    linear: Collection[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
    template: str | None = None,
    end_of_turn: int | None = None,
    variants: Variants | None = None,
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
) -> dict[str, VariantFiles]:
    """Write the merged model, with its configuration and tokenizer, to `output`, and variants of it to their folders.

    Args:
        base: folder of the base model.
        trained: folder of the adapter, or of the trained weights.
        output: folder of the merged model.
        kind: `bf16` merges into the base as it is, and `nf4` into its weights as NF4 training saw them.
        linear: names of the weights that training held in NF4: every linear layer but the head.
        on_progress: called with the bytes that are done, and all bytes.
        template: the chat template of training, if it is not the default of the base.
        end_of_turn: the token that ends an answer in training; generation must stop at it.
        variants: the variants to write in the same pass, with the bytes that the merged model would give.
        dtype: the type in which W + scale * B @ A is computed before it is rounded to bf16.
        whole: True if all weights of the model were trained, and there is no adapter.

    Raises:
        ModelError: if the base lacks a tensor, if the adapter does not fit the base, if a linear layer is missing (for
            nf4), or if values are not finite.
        QuantizationError: if a weight that variants quantize is missing. Other problems of a variant are in
            `variants.failed`.
    """
    checkpoint, variants = open_checkpoint(base, to_copy=True), variants or Variants()
    adapter = _read_trained(checkpoint, base, trained, dtype, whole)
    _check_held(checkpoint, base, kind, linear)
    merged = {
        name: replace(info, dtype=torch.bfloat16) if info.dtype.is_floating_point else info
        for name, info in checkpoint.items()
    }
    plan = {name: (info.dtype, info.shape) for name, info in merged.items()}
    output.mkdir(parents=True, exist_ok=True)
    _describe(base, output, template, end_of_turn)
    with (
        CheckpointWriter(output, plan, shard_bytes=SHARD_BYTES) as writer,
        variants.writing(merged, output) as quantize,
    ):

        def take(name: str, rows: torch.Tensor, first: int) -> None:
            changed = adapter.apply(name, rows, first)
            if changed.is_floating_point() and not are_finite(changed):
                broken = trained if are_finite(rows) else base
                raise ModelError(f"{broken}: makes values of {name!r} that are not finite; it is broken")
            writer.write(name, changed, first)
            quantize(name, changed, first)

        if kind == "nf4":  # threads that import it at once may find it without its kernels
            import bitsandbytes.functional  # noqa: F401

        jobs = _jobs(checkpoint, linear if kind == "nf4" else (), take, variants.together)
        in_parallel(jobs, checkpoint.nbytes, on_progress)
    return variants.finish(output)


def _describe(base: Path, output: Path, template: str | None, end_of_turn: int | None) -> None:
    """Write the merged model's configuration and tokenizer, with the end of turn among the tokens that end an answer.

    Many a base model has a chat template, and ends generation at another token than the template ends turns with. Such
    a model would learn to end its turns, and never stop.
    """
    # Paths of this machine and code that is not published are left out.
    dropped = ("_name_or_path", "_model_name_or_path", "auto_map")
    config = {k: v for k, v in read_config(base).items() if k not in dropped}
    config["dtype"] = "bfloat16"
    config.pop("torch_dtype", None)
    copy_companions(base, output)
    settings_file = output / "generation_config.json"
    settings = read_settings(settings_file) if settings_file.is_file() else config
    ends = _token_list(settings.get("eos_token_id"))
    if end_of_turn is not None and end_of_turn not in ends:
        config["eos_token_id"] = [*ends, end_of_turn] if ends else end_of_turn
        if settings is not config:
            settings["eos_token_id"] = config["eos_token_id"]
            settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")
    if template:
        write_chat_templates(output, chat_templates(base) | {DEFAULT: template})


def _token_list(tokens: Any) -> list:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def _read_trained(checkpoint: Checkpoint, base: Path, folder: Path, dtype: torch.dtype, whole: bool) -> Adapter:
    """Return the changes of the base model by an adapter or by trained weights; raise if they do not fit."""
    if whole:
        config = open_config(base).get_text_config()
        adapter = Adapter.of_whole_model(folder, checkpoint, config.vocab_size if config.tie_word_embeddings else None)
    else:
        adapter = Adapter.read(folder, dtype)
    _check_fit(checkpoint, base, adapter, folder)
    if not whole:
        _check_tables(checkpoint, base, adapter, folder)
    return adapter


def check_mergeable(
    base: Path,
    write: Callable[[Path], None],
    kinds: Collection[str],
    linear: Collection[str],
    whole: bool = False,
    within: Path | None = None,
) -> None:
    """Check before training that the result can be merged: write it untrained, and read it as `merge_checkpoint` does.

    Args:
        base: folder of the base model.
        write: writes what will be trained, before its training, to a folder.
        kinds: every kind of merge that will be made.
        linear, whole: as for `merge_checkpoint`.
        within: the folder to write below; by default that of the system for temporary files.

    Raises:
        ModelError: naming the base model and the reason.
    """
    with TemporaryDirectory(dir=within, prefix="untrained-", suffix=".partial") as folder:
        try:
            write(Path(folder))
            checkpoint = open_checkpoint(base, to_copy=whole)  # transformers writes a whole model with its own names
            _read_trained(checkpoint, base, Path(folder), torch.float32, whole)
            for kind in kinds:
                _check_held(checkpoint, base, kind, linear)
        except (ModelError, ValueError) as error:
            if whole:
                reason = str(error).removeprefix(f"{folder}: ")
                raise ModelError(f"{base}: its trained weights could not be published: {reason}. "
                                 "Try: another train.method") from None  # fmt: skip
            raise ModelError(
                f"{base}: an adapter for it could not be merged: {str(error).removeprefix(f'{folder}: ')}. "
                "Try: another base model, other train.lora.target_modules, or other train.lora.options"
            ) from None


def _check_held(checkpoint: Checkpoint, base: Path, kind: str, linear: Collection[str]) -> None:
    if kind == "nf4" and not (linear and set(linear) <= checkpoint.keys()):
        lost = [*sorted(set(linear) - checkpoint.keys()), "every linear layer"][0]
        raise ModelError(f"{base}: cannot tell what NF4 training saw; {lost} is missing")


def _check_fit(checkpoint: Checkpoint, base: Path, adapter: Adapter, folder: Path) -> None:
    for name, made in sorted(adapter.shapes().items()):
        if name not in checkpoint:
            raise ModelError(f"{folder}: changes {name!r}, which {base} does not have")
        if checkpoint[name].shape != made:
            raise ModelError(f"{folder}: made for a {name!r} of {made}; in {base} it is {checkpoint[name].shape}")


def _check_tables(checkpoint: Checkpoint, base: Path, adapter: Adapter, folder: Path) -> None:
    config, shapes = read_config(base), [info.shape for info in checkpoint.values()]
    stored = 2 if config.get("tie_word_embeddings") is True else 1  # some tied models store the one table twice
    for name in (*adapter.replaced, *adapter.changes):
        shape = checkpoint[name].shape
        if len(shape) == 2 and shape[0] >= (config.get("vocab_size") or 0) and shapes.count(shape) <= stored:
            # peft trains only one of its two uses, and a tied model cannot hold both.
            raise ModelError(f"{folder}: changes {name!r}, which {base} uses twice, as embedding and as output head")


def _jobs(checkpoint: Checkpoint, held: Collection[str], take: Take, together: Callable[[str], int]) -> Iterator[Job]:
    """Yield a job for each block of each tensor, in the order of the disk; a weight `held` in NF4 is one job."""
    for name in in_disk_order(checkpoint):
        if name in held:
            yield partial(_take_nf4, checkpoint, name, take, together(name))
        else:
            yield from blocks_of(checkpoint, name, take, together(name))


def _take_nf4(checkpoint: Checkpoint, name: str, take: Take, together: int) -> int:
    (rows, width), row_bytes = checkpoint[name].shape, checkpoint[name].row_bytes
    together = max(together, row_multiple(rows, width))
    pieces = (checkpoint.read_rows(name, *span) for span in tiles(rows, width, together))
    weight = Nf4Weight(pieces, (rows, width))
    for first, stop in row_blocks(rows, row_bytes, together):
        take(name, weight.rows(first, stop), first)
    return checkpoint[name].nbytes


def copy_adapter(source: Path, target: Path, hub_id: str | None) -> None:
    """Copy the two files of an adapter, without the values that describe the machine it was trained on."""
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, target / name)
    make_portable(target, hub_id)


def make_portable(adapter: Path, hub_id: str | None) -> None:
    """Rewrite the configuration of an adapter so that it is the same on every machine.

    peft writes the local path of the base model instead of its Hub id, and module names in the order of a set, which
    differs between processes.
    """
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = hub_id
    for key in ("target_modules", "exclude_modules"):
        if isinstance(content.get(key), list):
            content[key] = sorted(content[key])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
