"""Everything that is said of one model: quality on both texts, speed, memory, size, answers.

A model is always measured through its files. The full-precision model is the reference; what
it said of the texts is kept in the workspace, so that a variant can be compared without it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pipeline.checkpoint import Checkpoint
from pipeline.config import Config
from pipeline.errors import ModelError
from pipeline.events import Events
from pipeline.files import read_json, write_json
from pipeline.models import stored_bytes
from pipeline.workspace import Workspace

PROBE_TOKENS = 64
LOGIT_TOLERANCE = 0.05  # relative; kernels and dequantized weights differ by bf16 rounding, layer upon layer


def evaluate(
    label: str,
    folder: Path,
    config: Config,
    workspace: Workspace,
    events: Events,
    reference: Path | None = None,
    offload: bool | Literal["auto"] = "auto",
) -> dict:
    """Measure the model in `folder`.

    One that does not fit into the memory is offloaded: only its quality is measured then, for its speed would
    be that of the disk, and an answer would read the whole model for every token.

    Args:
        reference: the full-precision model to compare it with, measured before; None if it is this one.
        offload: as `pipeline.load` takes it.

    Returns:
        Plain data for `results.json`: size, quality per text, speed per loader, answers.

    Raises:
        ModelError: if the stock loader cannot load the folder, or where both loaders
            run and do not agree.
    """
    import torch

    from pipeline import machine, measure, texts
    from pipeline.loading import load
    from pipeline.offloading import is_offloaded

    def tell(what: str):
        return lambda done, total: events.progress(done, total, f"{label}: {what}")

    model, tokenizer = load(folder, offload=offload)
    offloaded = is_offloaded(model)
    texts.with_template(tokenizer, workspace)
    sequences = texts.all_texts(config, workspace, tokenizer)
    head_name = measure.head_name(model) if reference is None else None
    head, softcap = measure.head_matrix(model).to("cpu"), measure.softcap(model)
    scored = {text: measure.score(model, part, tell(f"{text} text")) for text, part in sequences.items()}
    samples = []
    if not offloaded:
        tell("sample answers")(0, 1)
        samples = measure.answers(model, tokenizer, config.evaluate.prompts)
    device = str(measure.device_of(model))
    parameters = model.num_parameters()
    ids = sequences[texts.GENERAL][0].input_ids[:PROBE_TOKENS]
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # the probes load the model again, in processes of their own

    quality = {
        text: {
            "text": config.data.source if text == texts.HELD_OUT else config.evaluate.general,
            "tokens": len(scores.nll),
            "sequences": int(scores.sequence.unique().numel()),
            "loss": asdict(measure.mean(scores.nll, scores.sequence)),
            "perplexity": asdict(measure.perplexity(scores)),
        }
        for text, scores in scored.items()
    }
    kept = workspace.measurements / "reference"
    if reference is None:
        write_json(kept / "head.json", {"name": head_name})
        for text, scores in scored.items():
            scores.save(kept / f"{text}.safetensors")
    else:
        theirs = Checkpoint(reference).read(read_json(kept / "head.json", {})["name"])
        for text, scores in scored.items():
            other = measure.Scores.load(kept / f"{text}.safetensors")
            compared = measure.divergence(scores, head, other, theirs, softcap, tell("divergence"))
            quality[text] |= {
                "rise": asdict(measure.rise(scores, other)),
                **{name: asdict(value) for name, value in compared.items()},
            }

    quantized = "quantization_config" in read_json(folder / "config.json", {})
    loaders = ("stock", "pipeline") if quantized else ("stock",)
    if not offloaded:
        tell("speed and memory, in fresh processes")(0, 1)
    return {
        "size_bytes": stored_bytes(folder),
        **({} if quantized else {"parameters": parameters}),
        "device": device,
        "loader": "pipeline.load",
        **({"offloaded": True} if offloaded else {}),
        "quality": quality,
        "speed": {} if offloaded else _speed(folder, ids, loaders),
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
