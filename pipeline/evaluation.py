"""Everything that is said of one model: quality on both texts, speed, memory, size, answers.

A model is always measured through its files. The merged model is the reference; what it
said of the texts is kept in the workspace, so that a variant can be compared without it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ModelError
from pipeline.events import Events
from pipeline.workspace import Workspace, read_json, write_json

PROBE_TOKENS = 64
LOGIT_TOLERANCE = 0.05  # relative; kernels and dequantized weights differ by bf16 rounding, layer upon layer


def evaluate(
    label: str,
    folder: Path,
    config: Config,
    workspace: Workspace,
    events: Events,
    is_reference: bool = False,
) -> dict:
    """Measure the model in `folder`, and compare it with the reference unless it is the reference.

    Returns:
        Plain data for `results.json`: size, quality per text, speed per loader, answers.

    Raises:
        ModelError: if the stock loader cannot load the folder, or where both loaders
            run and do not agree.
    """
    import torch

    from pipeline import machine, measure, texts
    from pipeline.loading import load

    def tell(what: str):
        return lambda done, total: events.progress(done, total, f"{label}: {what}")

    model, tokenizer = load(folder)
    sequences = texts.both(config, workspace, tokenizer)
    head_name, softcap = measure.output_head(model)
    head = model.get_output_embeddings().weight.detach().float().cpu()
    scored = {text: measure.score(model, part, tell(f"{text} text")) for text, part in sequences.items()}
    tell("sample answers")(0, 1)
    samples = measure.answers(model, tokenizer, config.evaluate.prompts)
    device = str(model.device)
    parameters = model.num_parameters()
    ids = sequences[texts.GENERAL][0].input_ids[:PROBE_TOKENS]
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # the probes load the model again, in processes of their own

    if is_reference:
        write_json(workspace.measurements / "reference" / "head.json", {"name": head_name})
    quality = {}
    for text, scores in scored.items():
        figures = {
            "text": config.data.source if text == texts.HELD_OUT else config.evaluate.general,
            "tokens": len(scores.nll),
            "sequences": int(scores.sequence.unique().numel()),
            "loss": asdict(measure.mean(scores.nll, scores.sequence)),
            "perplexity": asdict(measure.perplexity(scores)),
        }
        path = workspace.measurements / "reference" / f"{text}.safetensors"
        if is_reference:
            scores.save(path)
        else:
            reference = measure.Scores.load(path)
            figures["rise"] = asdict(measure.rise(scores, reference))
            compared = measure.divergence(
                scores, head, reference, _reference_head(workspace), softcap, tell("divergence")
            )
            figures |= {name: asdict(value) for name, value in compared.items()}
        quality[text] = figures

    quantized = "quantization_config" in read_json(folder / "config.json", {})
    tell("speed and memory, in fresh processes")(0, 1)
    return {
        "size_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        **({} if quantized else {"parameters": parameters}),
        "device": device,
        "loader": "pipeline.load",
        "quality": quality,
        "speed": _speed(folder, ids, ("stock", "pipeline") if quantized else ("stock",)),
        "answers": samples,
        "machine": machine.describe(),
    }


def _speed(folder: Path, ids: list[int], loaders: tuple[str, ...]) -> dict:
    """Figures by loader; where both run, their logits must agree."""
    from pipeline.probe import probe

    probes = {loader: probe(folder, loader, ids) for loader in loaders}
    figures = {("pipeline.load" if loader == "pipeline" else loader): p.figures for loader, p in probes.items()}
    if len(probes) == 2 and not probes["pipeline"].runs:
        raise ModelError(f"{folder}: does not run with pipeline.load: {probes['pipeline'].figures['reason']}")
    if len(probes) == 2 and probes["stock"].runs:
        ours, theirs = probes["pipeline"].logits, probes["stock"].logits
        difference = float((ours - theirs).norm() / theirs.norm())
        if difference > LOGIT_TOLERANCE:
            raise ModelError(f"{folder}: logits of pipeline.load differ from the stock loader's by {difference:.1%}")
        figures["pipeline.load"]["logits_off_stock"] = difference
    return figures


def _reference_head(workspace: Workspace):
    from pipeline.checkpoint import Checkpoint

    known = read_json(workspace.measurements / "reference" / "head.json", {})
    return Checkpoint(workspace.release).read(known["name"])
