"""Merge the adapter: into both bases, compare with the live adapter, keep the better."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from pipeline.config import Config
from pipeline.events import Events
from pipeline.libraries import versions
from pipeline.stages import Outcome
from pipeline.workspace import Workspace, empty_folder, replace_folder

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def parameters(config: Config, variant: str | None) -> dict:
    return {"base": config.merge.base, "method": config.train.method}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    return {
        "merge": config.merge.model_dump(),
        "method": config.train.method,
        "max_tokens": config.evaluate.max_tokens,
        "after": workspace.state_of("train"),
        "versions": versions(*LIBRARIES),
    }


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    from pipeline.libraries import quiet_progress_bars
    from pipeline.merging import merge_checkpoint
    from pipeline.models import linear_weights

    quiet_progress_bars()
    base = workspace.base_folder()
    linear = linear_weights(base)
    kinds = ("nf4", "bf16") if config.train.method == "qlora" else ("bf16",)
    if config.merge.base != "auto":
        kinds = (config.merge.base,)
    folders = {kind: empty_folder(workspace.folder / f"merged-{kind}.partial") for kind in kinds}
    for kind, folder in folders.items():
        what = f"merging into the {kind} base"
        merge_checkpoint(
            base, workspace.adapter, folder, kind, linear, lambda d, t, what=what: events.progress(d, t, what)
        )
    comparison = _compare(config, workspace, events, base, folders) if len(kinds) > 1 else {}
    chosen = _better(comparison) if comparison else kinds[0]

    release = folders.pop(chosen)
    shutil.copytree(workspace.adapter, release / "adapter")
    replace_folder(release, workspace.release)
    for folder in folders.values():
        shutil.rmtree(folder)
    measured = workspace.write_measurement(
        "merge", {"base": chosen, "asked": config.merge.base, "compared": comparison}
    )
    return Outcome((*_root_files(workspace.release), measured), {"base": chosen})


def _compare(config: Config, workspace: Workspace, events: Events, base: Path, folders: dict[str, Path]) -> dict:
    """Loss on held-out text of the live adapter and of each merged model, and KL(live || merged)."""
    from transformers import AutoTokenizer

    from pipeline import measure, texts
    from pipeline.checkpoint import Checkpoint
    from pipeline.loading import load

    tokenizer = AutoTokenizer.from_pretrained(base)
    sequences = texts.held_out(config, workspace, tokenizer)
    model = live_model(config, base, workspace.adapter)
    head_name, softcap = measure.output_head(model)
    live = measure.score(model, sequences, lambda d, t: events.progress(d, t, "measuring the live adapter"))
    del model
    result: dict = {"live": {"loss": asdict(measure.mean(live.nll, live.sequence)), "tokens": len(live.nll)}}
    live_head, losses = Checkpoint(base).read(head_name), {}
    for kind, folder in folders.items():
        model, _ = load(folder)
        what = f"measuring the merge into {kind}"
        scores = measure.score(model, sequences, lambda d, t, what=what: events.progress(d, t, what))
        head = model.get_output_embeddings().weight.detach().cpu().clone()
        del model
        losses[kind] = scores.nll
        result[kind] = {
            "loss": asdict(measure.mean(scores.nll, scores.sequence)),
            "loss_above_live": asdict(measure.mean(scores.nll - live.nll, live.sequence)),
            "kl": asdict(measure.divergence(scores, head, live, live_head, softcap)["kl"]),
        }
    result["nf4_minus_bf16"] = asdict(measure.mean(losses["nf4"] - losses["bf16"], live.sequence))
    return result


def _better(comparison: dict) -> str:
    """The base with the lower held-out loss; within the error, the one closer to the live adapter."""
    gap = comparison["nf4_minus_bf16"]
    if abs(gap["value"]) > 2 * gap["stderr"]:
        return "nf4" if gap["value"] < 0 else "bf16"
    return min(("nf4", "bf16"), key=lambda kind: comparison[kind]["kl"]["value"])


def live_model(config: Config, base: Path, adapter: Path):
    """The base as training held it, with the adapter on top and not merged."""
    from peft import PeftModel

    from pipeline.nf4 import load_base

    model = load_base(base, config.train.method == "qlora")
    return PeftModel.from_pretrained(model, adapter).eval()


def _root_files(release: Path) -> list[Path]:
    return sorted(p for p in release.iterdir() if p.is_file()) + [release / "adapter"]
