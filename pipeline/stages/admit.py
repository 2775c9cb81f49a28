"""Load one variant back, measure it, and let it into the release; without `evaluate` a GGUF is only opened."""

from __future__ import annotations

from pathlib import Path

from pipeline.catalog import VARIANTS
from pipeline.config import Config
from pipeline.events import Events
from pipeline.files import read_json
from pipeline.libraries import versions
from pipeline.models import stored_bytes
from pipeline.stages import Outcome, quantize
from pipeline.stages.inputs import full_model, model_bytes
from pipeline.stages.quantize import parameters
from pipeline.workspace import Workspace

__all__ = ["depends", "parameters", "run"]


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    found = quantize.depends(config, workspace, variants)
    if config.evaluate and any(VARIANTS[name].format == "gguf" for name in variants):
        found["measured_in"] = versions("llama-cpp-python")
    return found


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    (name,) = variants
    folder = workspace.quantized / name
    full = full_model(config, workspace, events)
    source = model_bytes(config, workspace, full)
    result = {"size_bytes": stored_bytes(folder)}
    if config.evaluate:
        from pipeline.evaluation import evaluate

        result = evaluate(name, folder, config, workspace, events, full)
    elif VARIANTS[name].format == "gguf":
        (file,) = folder.glob("*.gguf")
        _open(file)
        result["file"] = file.name
    result |= {
        "variant": config.quantize.spec(name).model_dump(),
        "ratio": result["size_bytes"] / source,
        "weights": read_json(workspace.quantized / f"{name}.json", {})["weights"],
    }
    files = workspace.place(folder, workspace.release / VARIANTS[name].folder, f"quantize/{name}")
    measured = workspace.write_measurement(name, result)
    quality = result.get("quality", {})
    summary = {
        "bytes_before": source,
        "bytes_after": result["size_bytes"],
        "ratio": round(result["ratio"], 4),
        **{f"{text}_perplexity": q["perplexity"]["value"] for text, q in quality.items()},
        **{f"{text}_kl": q["kl"]["value"] for text, q in quality.items()},
    }
    return Outcome((*files, measured), summary)


def _open(file: Path) -> None:
    """Raise where llama.cpp does not open the file, or, where that is not installed, where it is not whole."""
    from pipeline import llama_cpp
    from pipeline.gguf_keys import read_header

    if llama_cpp.is_installed():
        llama_cpp.check(file)
    else:
        read_header(file)
