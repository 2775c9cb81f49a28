"""Stage `calibrate`: statistics of the layers' inputs over calibration text, and weights that are rounded with them.

It goes through the full-precision model one decoder block at a time. After each block, its rounded weights and its
outputs are on disk, so that a stopped calibration goes on with the next block. Variants are written by `quantize`.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import EIGHT_BITS, Need
from pipeline.config.schema import Config, VariantSpec
from pipeline.errors import ConfigError, QuantizationError
from pipeline.system.files import fingerprint
from pipeline.system.hardware import dtype_name, give_back_buffers
from pipeline.system.libraries import versions
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome, calibration_text
from pipeline.workflow.stages.inputs import device_name, full_model, made_from
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantization.calibration.blocks import BlockwiseModel
    from pipeline.quantization.equivalences.folding import FoldedPowers
    from pipeline.quantization.grid import Grid
    from pipeline.quantization.layers import RoundedWeights
    from pipeline.quantization.statistics import Statistics

DISTILLED = "distilled"  # the folder of what `distill` makes of them
FOLDER, STATISTICS, BORDER = "calibration", "statistics.safetensors", "border.safetensors"


@dataclass(frozen=True)
class Calibrated:
    """The results of a calibration.

    Attributes:
        statistics: by the name of the weight.
        rounded: the weights of each variant that was rounded with Gram matrices.
        smoothing: for each variant with smoothed inputs, the change of the model's weights before they are rounded.
    """

    statistics: dict[str, Statistics]
    rounded: dict[str, RoundedWeights]
    smoothing: dict[str, FoldedPowers]


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {"tokens": config.quantize.calibration.tokens}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data; measured texts are among them, because they must be others."""
    specs = [config.quantize.spec(name).making() for name in variants]
    measured = calibration_text.measured(config, workspace)
    return {"specs": specs, "measured": measured, **collected_with(config, workspace)}


def collected_with(config: Config, workspace: Workspace) -> dict:
    """Return the dependencies of the statistics as plain data."""
    ranges = {"ranges": "smoothed"} if config.quantize.needs_ranges else {}
    return {
        **ranges,
        "calibration": config.quantize.calibration.model_dump(),
        "text": calibration_text.depends(config, workspace),
        "after": made_from(config, workspace),
        "versions": versions("torch", "transformers"),
    }


def check(config: Config) -> None:
    """Raise an error if there is no text to calibrate on, or the model cannot be read block by block.

    Raises:
        ConfigError: with the key to set.
    """
    if not config.quantize.calibrated:
        return
    if not config.quantize.calibration.sources and config.data is None:
        raise ConfigError(
            f"quantize.quality {config.quantize.quality}: there is no training data to calibrate on. "
            "Try: quantize.calibration.source=FILE.txt (--calibration-text FILE.txt)"
        )
    if config.model.low_disk:
        raise ConfigError(
            f"quantize.quality {config.quantize.quality}: needs the whole model. Try: leave out model.low_disk"
        )


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Collect statistics, and round the weights of the variants that need whole matrices of them.

    Weights that an earlier calibration rounded with the same settings and statistics stay as they are.
    """
    import torch
    from safetensors.torch import load_file

    from pipeline.inference.load import device_named
    from pipeline.models.matrices import refuse_other_matrices
    from pipeline.quantization.calibration.blocks import BlockwiseModel
    from pipeline.quantization.calibration.collect import collect
    from pipeline.quantization.calibration.rounding import round_layers
    from pipeline.quantization.calibration.store import (
        powers_as_tensors,
        powers_from,
        save_block,
        save_whole,
        statistics_as_tensors,
        statistics_from,
    )
    from pipeline.quantization.equivalences.folding import FoldedPowers
    from pipeline.quantization.layers import unfit
    from pipeline.quantization.roundings import rounding

    give_back_buffers()  # a pass makes and frees many of them, of all sizes
    source = full_model(config, workspace, events)
    refuse_other_matrices(source)
    windows = calibration_text.windows(config, workspace, source, config.quantize.calibration.tokens)
    calibration_text.check_for_distillation(config, workspace, source)
    folder = workspace.folder / FOLDER
    outcome = Outcome((folder,), {"tokens": sum(map(len, windows))})
    device = device_named(device_name(config))
    model = BlockwiseModel(source, device=str(device))
    specs = [config.quantize.spec(name) for name in variants]
    specs = [spec for spec in specs if not unfit(spec, model.linear, source)]  # `quantize` reports the others
    if not specs:
        return Outcome((), {"tokens": 0})
    on_grids = {spec.name: grids(spec, model) for spec in specs if spec.need(True) == Need.GRAM_MATRIX}
    # A calibration that goes on elsewhere must not mix compute types.
    computed = {"statistics": fingerprint([collected_with(config, workspace), dtype_name(model.dtype)])}
    wanted = computed | {name: fingerprint(config.quantize.spec(name).making()) for name in on_grids}
    kept = _kept(workspace, computed["statistics"])
    if wanted.items() <= kept.items():
        return outcome
    missing = {name: made for name, made in wanted.items() if kept.get(name) != made}
    first, activations, statistics, smoothing = 0, None, {}, FoldedPowers()
    if workspace.progress("calibrate", "block") == computed | missing and (folder / BORDER).is_file():
        border = load_file(folder / BORDER)
        first, statistics = int(border["block"]) + 1, statistics_from(border)
        smoothing = powers_from(border)
        activations = [border[str(number)] for number in range(len(border)) if str(number) in border]
    else:
        _remove_except(folder, [STATISTICS, *(kept.keys() - missing.keys())] if kept else [])
        workspace.note("calibrate", block=computed | missing)
    events.progress(first, model.count, "calibrating")
    rounded = [spec for spec in specs if spec.name in missing]
    need = Need.GRAM_MATRIX if rounded else Need.SECOND_MOMENTS
    for found in collect(model, windows, need, first, activations, config.quantize.needs_ranges):
        for spec in rounded:
            here = {name: on for name, on in on_grids[spec.name].items() if name in found.statistics}
            powers = found.smoothing if spec.variant.static_inputs else FoldedPowers()
            read, how = powers.reading(model.weight_rows), rounding(str(spec.rounding))
            made = round_layers(how, read, here, powers.divide(found.statistics))
            save_block(folder / spec.name, found.block, made)
        statistics |= {name: replace(of, gram=None) for name, of in found.statistics.items()}
        smoothing |= found.smoothing
        outputs = {str(number): hidden for number, hidden in enumerate(found.activations)}
        kept_so_far = statistics_as_tensors(statistics) | powers_as_tensors(smoothing)
        border = {"block": torch.tensor(found.block), **kept_so_far, **outputs}
        save_whole(border, folder / BORDER)
        events.progress(found.block + 1, model.count, "calibrating")
        del found, outputs, border  # or its Gram matrices would stay in memory until those of the next block are there
    save_whole(statistics_as_tensors(statistics) | powers_as_tensors(smoothing), folder / STATISTICS)
    (folder / BORDER).unlink()
    workspace.note("calibrate", block=None, made={**kept, **computed, **missing})
    return outcome


def _kept(workspace: Workspace, statistics: str) -> dict[str, str]:
    """Return what is made and unchanged on disk: fingerprints by variant, and that of the statistics.

    Args:
        statistics: the fingerprint of the statistics that all of it must have been made with.
    """
    made, finished = workspace.progress("calibrate", "made"), workspace.ledger().get("calibrate")
    if finished is None or made.get("statistics") != statistics:
        return {}
    places: dict[str, list[bool]] = {}
    for path, digest in finished.outputs.items():
        places.setdefault(Path(path).parts[1], []).append(digest.holds(workspace.folder / path))
    there = {place for place, holds in places.items() if all(holds)}
    if STATISTICS not in there:
        return {}
    return {name: value for name, value in made.items() if name == "statistics" or name in there}


def _remove_except(folder: Path, names: Collection[str]) -> None:
    """Remove everything in the folder of the calibration but these names."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def grids(spec: VariantSpec, model: BlockwiseModel) -> dict[str, tuple[tuple[int, int], Grid]]:
    """Return shapes and grids of the layers to round with their inputs; the writer rounds layers in eight bits.

    Raises:
        QuantizationError: naming a layer that is outside the decoder blocks.
    """
    from pipeline.quantization.fit import named
    from pipeline.quantization.layers import layer_grids

    eight = named(spec, EIGHT_BITS, model.linear)
    found, _ = layer_grids(spec, model.linear)
    inner = {name: (shape, grid) for name, (shape, grid) in found.items() if grid is not None and name not in eight}
    inside = {name for block in range(model.count) for name in model.weights_of(block)}
    if others := sorted(inner.keys() - inside):
        layer = others[0].removesuffix(".weight")
        raise QuantizationError(
            f"{spec.name}: {layer} is outside the decoder blocks, so rounding {spec.rounding} has no statistics of "
            f"its inputs. Try: keep: [{layer}]"
        )
    return inner


def about(config: Config, workspace: Workspace) -> dict:
    """Return the text and the tokens of the finished calibration, for cards."""
    tokens = workspace.ledger()["calibrate"].summary["tokens"]
    return calibration_text.about(config, workspace) | {"calibration_tokens": tokens}


def read(config: Config, workspace: Workspace, names: Collection[str]) -> Calibrated:
    """Return the results of a finished calibration for these variants; nothing for those that were not calibrated."""
    from pipeline.quantization.calibration.store import RoundedFolder, read_statistics

    specs = [config.quantize.spec(name) for name in names if name in config.quantize.calibrated]
    if not specs:
        return Calibrated({}, {}, {})
    statistics, smoothing = read_statistics(workspace.folder / FOLDER / STATISTICS)

    def folder(name: str) -> Path:
        return workspace.folder / (DISTILLED if name in config.quantize.distilled else FOLDER) / name

    return Calibrated(
        statistics,
        {spec.name: RoundedFolder(folder(spec.name)) for spec in specs if spec.need(True) == Need.GRAM_MATRIX},
        {spec.name: smoothing for spec in specs if spec.variant.static_inputs},
    )
