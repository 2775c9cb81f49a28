"""Load one variant back, measure it, and let it into the release; without `evaluate` only the last."""

from __future__ import annotations

from pipeline.catalog import VARIANTS
from pipeline.config import Config
from pipeline.events import Events
from pipeline.files import read_json
from pipeline.models import stored_bytes
from pipeline.stages import Outcome
from pipeline.stages.inputs import full_model, model_bytes
from pipeline.stages.quantize import depends, parameters
from pipeline.workspace import Workspace

__all__ = ["depends", "parameters", "run"]


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    (name,) = variants
    folder = workspace.quantized / name
    full = full_model(config, workspace, events)
    source = model_bytes(config, workspace, full)
    result = {"size_bytes": stored_bytes(folder)}
    if config.evaluate:
        from pipeline.evaluation import evaluate

        result = evaluate(name, folder, config, workspace, events, full)
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
