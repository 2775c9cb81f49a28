"""The process that loads one model of a release and measures its perplexity.

    python -m pipeline.verification.measure_process REQUEST.json RESULT.json

Prints its progress as lines of JSON. Loads only safetensors and GGUF, and runs no code of the model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.catalog import LLAMA_CPP
from pipeline.config.schema import Config, MeasuredRun, TrainingRun
from pipeline.errors import CheckpointError, DataError, MissingExtra, UserError
from pipeline.models.checkpoint_files import read_config
from pipeline.models.context import context_length
from pipeline.models.safe_loading import open_config, open_model, open_tokenizer
from pipeline.system.files import read_json, write_json
from pipeline.system.libraries import quiet, quiet_progress_bars
from pipeline.workflow.stages.inputs import run_texts
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.encode import Encoded
    from pipeline.evaluation.metrics import Scores
    from pipeline.inference.llama_cpp import Reader

OUTDATED, DAMAGED, MISSING, FAILED = (
    "outdated",
    "damaged",
    "missing",
    "failed",
)  # reasons why a model could not be measured


def main() -> None:
    """Answer the request in the first file, and write the answer into the second."""
    quiet()
    quiet_progress_bars()
    write_json(Path(sys.argv[2]), look(read_json(Path(sys.argv[1]), {})))


def look(request: dict) -> dict:
    """Return the figures of a model, or `problem` and `reason` if it cannot be measured."""
    try:
        return _adapter(request) if request["model"] == "adapter" else _measured(request)
    except MissingExtra as error:
        return {"problem": MISSING, "reason": str(error)}
    except Exception as error:  # libraries raise anything for files that are not for them
        problem, reason = _why(request, error)
        return {"problem": problem, "reason": reason}


def _measured(request: dict) -> dict:
    """Return perplexity and digest of the tokens by text, and the reasons for missing texts."""
    from pipeline.evaluation import metrics, texts
    from pipeline.inference import llama_cpp
    from pipeline.inference.load import load, load_dequantized

    config, folder = Config.model_validate(request["config"]), Path(request["folder"])
    workspace, file = Workspace(request["workspace"]), request["file"]
    if request["loader"] == LLAMA_CPP:
        if not llama_cpp.is_installed():
            raise MissingExtra(f"{request['model']}: measuring it in llama.cpp", "llama-cpp")
        reference = Path(request["reference"])
        tokenizer, context = open_tokenizer(reference), context_length(open_config(reference).to_dict())
        sequences, problems = _texts(config, workspace, tokenizer, request, context)
        longest = max((len(s.input_ids) for part in sequences.values() for s in part), default=16)
        with llama_cpp.opened(Path(file), longest) as reader:
            scored = {text: _in_llama_cpp(reader, part, text) for text, part in sequences.items()}
            if not scored:
                reader.begin()
                next(iter(reader.read([0, 1], [True, True])))
    else:
        device = config.evaluate.device if config.evaluate else "auto"
        if file:
            model, tokenizer = load_dequantized(Path(file), Path(request["reference"]), device, offload="auto")
        else:
            model, tokenizer = load(folder, device=device, offload="auto")
        context = context_length(model.config.to_dict())
        sequences, problems = _texts(config, workspace, tokenizer, request, context)
        scored = {text: metrics.score(model, part, _teller(text)) for text, part in sequences.items()}
        if not scored:
            _run_once(model)
    quality = {}
    for text, scores in scored.items():
        perplexity = metrics.perplexity(scores)
        quality[text] = {"digest": texts.digest(sequences[text]), "perplexity": perplexity.value}
    return {"quality": quality, "problems": problems}


def _texts(
    config: Config, workspace: Workspace, tokenizer: PreTrainedTokenizerBase, request: dict, context: int | None
) -> tuple[dict[str, list[Encoded]], dict[str, str]]:
    """Return the encoded texts, and the reasons why others are not available."""
    from pipeline.evaluation import texts

    kept = run_texts(workspace)
    texts.restore_template(tokenizer, kept)
    config = texts.apply_plan(config, kept.plan)
    found, problems = {}, {}
    for text in request["texts"]:
        by_cluster = text in request["by_cluster"]
        try:
            if text == texts.HELD_OUT:
                if not isinstance(config, TrainingRun):
                    raise DataError("the configuration names no data, so there is no held-out text")
                found[text] = texts.held_out(config, kept, tokenizer, by_cluster)
            else:
                if not isinstance(config, MeasuredRun):
                    raise DataError("the configuration measures nothing, so there is no general text")
                found[text] = texts.general(config, tokenizer, context, by_cluster)
        except DataError as error:
            problems[text] = str(error)
    return found, problems


def _in_llama_cpp(reader: Reader, sequences: list[Encoded], text: str) -> Scores:
    import torch

    from pipeline.evaluation import metrics

    targets = torch.tensor([label for s in sequences for label in s.labels[1:] if label != metrics.IGNORED])
    nll, start = torch.empty(len(targets)), 0
    for logits in metrics.counted_logits(reader, sequences):
        rows = slice(start, start + len(logits))
        nll[rows] = metrics.token_losses(logits, targets[rows])
        start = rows.stop
        _tell(start, len(targets), f"{text} text")
    return metrics.Scores(nll, torch.empty_like(targets), metrics.clusters(sequences), hidden=None)


def _run_once(model: Any) -> None:
    import torch

    from pipeline.inference.output_head import device_of

    with torch.no_grad():
        logits = model(torch.tensor([[0, 1, 2, 3]], device=device_of(model)), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("gives logits that are not finite")


def _adapter(request: dict) -> dict:
    """Raise if the adapter does not load, or does not fit the model at the root."""
    from peft import PeftModel

    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.checkpoint.row_blocks import are_finite
    from pipeline.models.lora_adapter import Adapter

    folder, root = Path(request["folder"]), Path(request["reference"])
    adapter, base = Adapter.read(folder), Checkpoint(root)
    for name, shape in adapter.shapes().items():
        if name not in base or base[name].shape != shape:
            raise CheckpointError(f"changes {name!r} of shape {shape}, which the model at the root does not have")
    for name in adapter.tensors:
        if not are_finite(adapter.tensors.read(name).float()):
            raise CheckpointError(f"{name!r} is not finite")
    model = open_model(root, dtype="auto")
    _run_once(PeftModel.from_pretrained(model, folder))
    return {"quality": {}, "problems": {}}


def _why(request: dict, error: Exception) -> tuple[str, str]:
    """Return the kind of problem (damaged files, other libraries, or a failure) and its reason."""
    reason = " ".join(str(error).split()) or type(error).__name__
    folder = Path(request["folder"])
    try:
        if unknown := _unknown_format(folder):
            return OUTDATED, unknown
        _check_whole(request, folder)
    except UserError as damage:
        return DAMAGED, str(damage)
    return FAILED, reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"


def _unknown_format(folder: Path) -> str | None:
    """Return the part of a model's configuration that the installed libraries do not know."""
    from transformers import CONFIG_MAPPING
    from transformers.quantizers.auto import AutoQuantizationConfig

    if not (folder / "config.json").is_file():  # an adapter, or GGUF
        return None
    config = read_config(folder)
    if config.get("model_type") not in CONFIG_MAPPING:
        return f"transformers knows no model_type {config.get('model_type')!r}"
    if quantization := config.get("quantization_config"):
        try:
            AutoQuantizationConfig.from_dict(dict(quantization))
        except Exception as error:
            return f"unknown quantization_config: {str(error).splitlines()[0] if str(error) else error!r}"
    return None


def _check_whole(request: dict, folder: Path) -> None:
    """Raise if the files are damaged, so that no library can load them."""
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.gguf_metadata import read_header

    if request["file"]:
        read_header(Path(request["file"]))
    elif request["model"] == "adapter":
        Checkpoint.of_files([folder / "adapter_model.safetensors"])
    else:
        Checkpoint(folder)


def _teller(text: str) -> Callable[[int, int], None]:
    return lambda done, total: _tell(done, total, f"{text} text")


def _tell(done: int, total: int, what: str) -> None:
    print(json.dumps([done, total, what]), flush=True)


if __name__ == "__main__":
    main()
