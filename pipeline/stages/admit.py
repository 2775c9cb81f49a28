"""Load one variant back, measure it, and let it into the release. Nothing else gets there."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.events import Events
from pipeline.stages import Outcome
from pipeline.stages.quantize import depends, parameters
from pipeline.workspace import Workspace, read_json, replace_folder

__all__ = ["depends", "parameters", "run"]


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    from pipeline.evaluation import evaluate

    (name,) = variants
    spec = config.quantize.spec(name)
    folder = workspace.quantized / name
    result = evaluate(name, folder, config, workspace, events)
    made = read_json(workspace.quantized / f"{name}.json", {})
    source = workspace.read_measurement("merged")["size_bytes"]
    ratio = result["size_bytes"] / source
    result |= {"variant": spec.model_dump(), "ratio": ratio, "weights": made}
    replace_folder(folder, workspace.release / name)
    measured = workspace.write_measurement(name, result)
    files = sorted(p for p in (workspace.release / name).iterdir() if p.is_file())
    summary = {
        "bytes_before": source,
        "bytes_after": result["size_bytes"],
        "ratio": round(ratio, 4),
        **{f"{text}_perplexity": q["perplexity"]["value"] for text, q in result["quality"].items()},
        **{f"{text}_kl": q["kl"]["value"] for text, q in result["quality"].items()},
    }
    return Outcome((*files, measured), summary)
