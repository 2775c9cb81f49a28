"""Stage `distill`: scales and zeros of calibrated variants, trained to give the logits of the full-precision model.

It goes on from what `calibrate` has rounded. Layers in eight bits and tables stay in full precision while it trains.
A stopped distillation goes on from its last measurement on held-out text.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.system.files import empty_folder, fingerprint, replace_folder
from pipeline.system.hardware import give_back_buffers
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome, calibrate, calibration_text
from pipeline.workflow.stages.inputs import device_name, full_model
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantization.calibration.blocks import BlockwiseModel
    from pipeline.quantization.calibration.store import RoundedLayers
    from pipeline.quantization.distillation import Distilled, Values

HELD_OUT = 16  # one window of so many is held out, or of fewer if there is little text


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {"tokens": config.quantize.distillation.tokens}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    return _trained_with(config, workspace, variants) | {"calibrated": calibrate.depends(config, workspace, variants)}


def _trained_with(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    specs = [config.quantize.spec(name).making() for name in variants]
    collected = calibrate.collected_with(config, workspace)
    return {"specs": specs, "distillation": config.quantize.distillation.model_dump(), "collected": collected}


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Train the scales and zeros of each variant that `calibrate` has rounded."""
    from pipeline.inference.load import device_named
    from pipeline.quantization.calibration.blocks import BlockwiseModel

    source = full_model(config, workspace, events)
    windows = calibration_text.windows(config, workspace, source, config.quantize.distillation.tokens)
    give_back_buffers()  # a pass makes and frees many of them, of all sizes
    device = device_named(device_name(config))
    model = BlockwiseModel(source, device=str(device))
    summary: dict[str, float] = {}
    for name in variants:
        folder = workspace.folder / calibrate.DISTILLED / name
        about = fingerprint(_trained_with(config, workspace, (name,)))
        known = workspace.progress(f"distill/{name}", "distilled")
        if known.get("about") != about or not folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            found = _distill(config, workspace, events, name, model, source, windows, about)
            known = {"about": about, "steps": found.steps, "kl_before": found.before, "kl_after": found.after}
            workspace.note(f"distill/{name}", distilled=known)
        summary |= {f"{name}_{key}": known[key] for key in ("steps", "kl_before", "kl_after")}
    return Outcome(tuple(workspace.folder / calibrate.DISTILLED / name for name in variants), summary)


def _distill(
    config: Config,
    workspace: Workspace,
    events: Events,
    name: str,
    model: BlockwiseModel,
    source: Path,
    windows: list[list[int]],
    about: str,
) -> Distilled:
    """Train one variant, and write its layers with their new scales and zeros.

    Args:
        about: fingerprint of what the result depends on.
    """
    from pipeline.inference.output_head import head_names
    from pipeline.quantization.calibration.collect import BATCH_TOKENS
    from pipeline.quantization.calibration.store import RoundedFolder, RoundedLayers
    from pipeline.quantization.distillation import Schedule, distill

    spec = config.quantize.spec(name)
    layers = RoundedLayers(RoundedFolder(workspace.folder / calibrate.FOLDER / name), calibrate.grids(spec, model))
    every = min(HELD_OUT, len(windows) // 2)  # `calibration_text.check` has seen to it that there are two
    held_out = windows[::every]
    training = [window for number, window in enumerate(windows) if number % every]
    head = head_names(model.skeleton).read(source).to(model.device)
    state = workspace.folder / calibrate.DISTILLED / f"{name}.state"
    if workspace.progress(f"distill/{name}", "begun") != {"about": about}:
        empty_folder(state)
        workspace.note(f"distill/{name}", begun={"about": about})
    schedule = Schedule(steps=max(1, config.quantize.distillation.tokens // BATCH_TOKENS))
    found, values = distill(
        model,
        (head, head),
        layers,
        training,
        held_out,
        schedule,
        state,
        lambda done, total, what: events.progress(done, total, f"distilling {name}, {what}"),
    )
    _write(workspace.folder / calibrate.DISTILLED / name, model, layers, values)
    shutil.rmtree(state)
    return found


def _write(folder: Path, model: BlockwiseModel, layers: RoundedLayers, values: Values) -> None:
    """Write the layers of every block with their new scales and zeros."""
    from pipeline.quantization.calibration.store import save_block

    partial = empty_folder(folder.with_name(f"{folder.name}.partial"))
    for block in range(model.count):
        made = {}
        for name in (name for name in model.weights_of(block) if name in layers):
            old, (scale, zero) = layers[name], values[name]
            made[name] = replace(old, scale=scale, zero=old.zero if zero is None else zero)
        save_block(partial, block, made)
    replace_folder(partial, folder)


def about(workspace: Workspace, name: str) -> dict:
    """Return what the finished distillation of a variant reached, for cards."""
    known = workspace.progress(f"distill/{name}", "distilled")
    return {f"distilled_{key}": known[key] for key in ("steps", "kl_before", "kl_after")}
