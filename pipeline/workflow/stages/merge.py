"""Stage `merge`: the adapter merged into both bases, compared with the unmerged adapter, and the better one kept.

Weights that were trained without an adapter are rounded to bf16.
If there is only one base, the variants are made in the same pass over it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import REPO_ID, Config, TrainingRun
from pipeline.config.training_catalog import METHODS
from pipeline.errors import CheckpointError, ModelError, QuantizationError
from pipeline.evaluation.cluster_errors import MARGIN, quantile
from pipeline.evaluation.results import Merge, MergeComparison, MergeLoss
from pipeline.models.checkpoint_files import ADAPTER_FILES
from pipeline.models.safe_loading import open_tokenizer, read_settings
from pipeline.system.files import empty_folder
from pipeline.system.libraries import MERGING, versions
from pipeline.tracking.events import Events
from pipeline.training.trainers import merge_bases
from pipeline.workflow.stages import Outcome
from pipeline.workflow.stages.inputs import adapter, adapter_depends, base_model, model_depends, run_texts
from pipeline.workflow.stages.quantize import keep_written, to_write
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantization.writer import VariantFiles, Variants


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    about = {"adapter": config.merge.adapter} if config.merge.adapter else {"method": config.train.method}
    return {"base": config.merge.base, **about}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    brought = {"model": model_depends(config, workspace), "adapter": adapter_depends(config, workspace)}
    trained = {"method": config.train.method, "max_tokens": config.evaluate and config.evaluate.max_tokens}
    return {
        "merge": config.merge.model_dump(),
        **(trained if config.data else brought),
        "after": workspace.state_of("train") if config.data else {},
        "versions": versions(*MERGING),
    }


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Merge the adapter, or round the trained weights, and place the merged model in the release."""
    from pipeline.models.matrices import linear_weights, quantizable_weights
    from pipeline.system.libraries import quiet_progress_bars
    from pipeline.training.merge import copy_adapter, merge_checkpoint
    from pipeline.training.qat import merge_dtype

    quiet_progress_bars()
    base, trained = base_model(config, workspace, events), adapter(config, workspace, events)
    linear, (template, end_of_turn) = linear_weights(base), _learned_turns(base, workspace)
    folders = {kind: empty_folder(workspace.folder / f"merged-{kind}.partial") for kind in merge_bases(config)}
    # With two bases, the base for the variants is known only after the comparison.
    parts = quantizable_weights(base)
    along = _variants_along(config, workspace, events, base, parts) if len(folders) == 1 else None
    dtype, made = merge_dtype(config), {}
    for kind, folder in folders.items():
        merge = partial(merge_checkpoint, base, trained, folder, kind, linear, template=template, dtype=dtype)
        merge = partial(merge, end_of_turn=end_of_turn, whole=not config.has_adapter)
        what = f"merging into the {kind} base" if config.has_adapter else "writing the trained model"
        made = _merge(merge, what, events, along)
    comparison = MergeComparison()
    if isinstance(config, TrainingRun) and len(folders) > 1:
        comparison = _compare(config, workspace, events, base, folders)
    chosen = _better(comparison) if comparison.nf4_minus_bf16 else next(iter(folders))

    release = folders.pop(chosen)
    if config.has_adapter:
        named = workspace.read_measurement("origin")["hub_id"] or _own_base(config, trained)
        copy_adapter(trained, release / "adapter", named)
    files = workspace.place(release, workspace.release, "merge")
    workspace.drop_measurement("retraining")  # of the former model
    keep_written(config, workspace, made, workspace.release)
    for folder in folders.values():
        shutil.rmtree(folder)
    found = Merge(base=chosen, asked=config.merge.base, compared=comparison)
    measured = workspace.write_measurement("merge", found.to_json())
    return Outcome((*files, measured), {"base": chosen} | ({"variants": ", ".join(made)} if made else {}))


def _own_base(config: Config, adapter: Path) -> str | None:
    """Return the repository that an adapter from elsewhere names as its base; None for one that was trained here."""
    named = read_settings(adapter / ADAPTER_FILES[0]).get("base_model_name_or_path") if config.merge.adapter else None
    return named if isinstance(named, str) and REPO_ID.match(named) else None


def _variants_along(config: Config, workspace: Workspace, events: Events, base: Path, linear: dict) -> Variants | None:
    """Return the variants that can be made in the merge's own pass; `quantize` reports why others cannot."""
    later = (*config.quantize.calibrated, *config.quantize.targeted)
    names = [spec.name for spec in config.quantize.variants if spec.name not in later]
    with suppress(ModelError, OSError):
        variants, _ = to_write(config, workspace, events, names, base, linear)
        return variants if variants.specs else None
    return None


def _merge(merge: Callable, what: str, events: Events, along: Variants | None) -> dict[str, VariantFiles]:
    """Merge, with the variants in the same pass; if they fail, merge without them, and `quantize` reports the cause."""
    if along:
        also = f"{what}, and writing {' and '.join(spec.name for spec in along.specs)}"
        try:
            made = merge(on_progress=lambda d, t: events.progress(d, t, also), variants=along)
            for name, error in along.failed.items():
                print(f"{name}: not made on the way, after: {error}", file=sys.stderr)
            return made
        except (QuantizationError, CheckpointError, OSError) as error:
            print(f"merging again without variants, after: {error}", file=sys.stderr)
    return merge(on_progress=lambda d, t: events.progress(d, t, what))


def _learned_turns(base: Path, workspace: Workspace) -> tuple[str | None, int | None]:
    """Return the chat template that training supplied or chose, and the token that ends an answer, if any.

    The merged model must have both. It is not known what an adapter from elsewhere was taught.
    """
    from pipeline.data.chat import ChatTemplate
    from pipeline.evaluation.texts import restore_template

    data = workspace.read_measurement("data")
    if not data:
        return None, None
    tokenizer = open_tokenizer(base)
    if data.get("template") is None:  # running text, which ends with the end of text
        return None, tokenizer.eos_token_id
    own = tokenizer.chat_template
    restore_template(tokenizer, run_texts(workspace))
    learned = tokenizer.chat_template
    return None if learned == own else learned, ChatTemplate(tokenizer).end_of_turn()


def _compare(
    config: TrainingRun, workspace: Workspace, events: Events, base: Path, folders: dict[str, Path]
) -> MergeComparison:
    """Return the held-out loss of the unmerged adapter and of each merged model, and KL(unmerged || merged)."""
    from pipeline.evaluation import metrics, texts
    from pipeline.inference import output_head
    from pipeline.inference.load import load

    known = run_texts(workspace)
    tokenizer = texts.restore_template(open_tokenizer(base), known)
    model = live_model(config, base, workspace.adapter)
    sequences = texts.held_out(config, texts.plan_tokens(config, known, model, tokenizer), tokenizer)
    names = output_head.head_names(model)
    live = metrics.score(model, sequences, lambda d, t: events.progress(d, t, "measuring the live adapter"))
    del model
    result = {"live": MergeLoss(loss=metrics.mean(live.nll, live.cluster), tokens=len(live.nll))}
    live_head, losses = names.read(base), {}
    for kind, folder in folders.items():
        model, _ = load(folder, offload="auto")
        tell = partial(events.progress, what=f"measuring the merge into {kind}")
        scores = metrics.score(model, sequences, tell)
        del model
        losses[kind] = scores.nll
        result[kind] = MergeLoss(
            loss=metrics.mean(scores.nll, scores.cluster),
            loss_above_live=metrics.mean(scores.nll - live.nll, live.cluster),
            kl=metrics.divergence(scores, names.read(folder), live, live_head).kl,
        )
    gap = metrics.mean(losses["nf4"] - losses["bf16"], live.cluster)
    return MergeComparison(**result, nf4_minus_bf16=gap, freedom=metrics.freedom(live.cluster))


def _better(comparison: MergeComparison) -> str:
    """Return the base with the lower held-out loss; within the error, the one closer to the unmerged adapter."""
    gap, nf4, bf16 = comparison.nf4_minus_bf16, comparison.nf4, comparison.bf16
    assert gap and nf4 and bf16 and nf4.kl and bf16.kl, "both bases were compared"
    if abs(gap.value) > quantile(MARGIN, comparison.freedom or 0) * gap.stderr:  # never true without an error
        return "nf4" if gap.value < 0 else "bf16"
    return "nf4" if nf4.kl.value <= bf16.kl.value else "bf16"


def live_model(config: Config, base: Path, adapter: Path) -> Any:
    """Return the base model as in training, with the unmerged adapter."""
    from peft import PeftModel

    from pipeline.system import hardware
    from pipeline.training.fused_layers import fuse_layers
    from pipeline.training.nf4_base import load_base

    model = PeftModel.from_pretrained(load_base(base, METHODS[config.train.method].in_nf4), adapter).eval()
    if model.device.type == "cpu":
        fuse_layers(model, hardware.compute_dtype("cpu"))
    return model
