"""Stage `calibrate`: statistics of the layers' inputs over calibration text, and weights that are rounded with them.

It goes through the full-precision model one decoder block at a time. After each block, its rounded weights and its
outputs are on disk, so that a stopped calibration goes on with the next block. Variants are written by `quantize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.catalog import EIGHT_BITS, Need
from pipeline.config.schema import Config, VariantSpec
from pipeline.errors import ConfigError, QuantizationError
from pipeline.system.files import empty_folder, fingerprint
from pipeline.system.libraries import versions
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome, calibration_text
from pipeline.workflow.stages.inputs import full_model, made_from
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantization.calibration.blocks import BlockwiseModel
    from pipeline.quantization.grid import Grid
    from pipeline.quantization.layers import RoundedWeights
    from pipeline.quantization.statistics import Statistics

DISTILLED = "distilled"  # the folder of what `distill` makes of them
FOLDER, STATISTICS, BORDER = "calibration", "statistics.safetensors", "border.safetensors"


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {"tokens": config.quantize.calibration.tokens}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data; measured texts are among them, because they must be others."""
    return _rounded_with(config, workspace) | {"measured": calibration_text.measured(config, workspace)}


def _rounded_with(config: Config, workspace: Workspace) -> dict:
    specs = [config.quantize.spec(name).making() for name in config.quantize.calibrated]
    return {"specs": specs, **collected_with(config, workspace)}


def collected_with(config: Config, workspace: Workspace) -> dict:
    """Return the dependencies of the statistics as plain data."""
    return {
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
    if not config.quantize.calibrates:
        return
    if not config.quantize.calibration.sources and config.data is None:
        raise ConfigError(
            "quantize.quality calibrated: there is no training data to calibrate on. "
            "Try: quantize.calibration.source=FILE.txt"
        )
    if config.model.low_disk:
        raise ConfigError("quantize.quality calibrated: needs the whole model. Try: leave out model.low_disk")


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Collect statistics, and round the weights of the variants that need whole matrices of them."""
    from safetensors.torch import load_file

    from pipeline.models.matrices import refuse_other_matrices
    from pipeline.quantization.calibration.blocks import BlockwiseModel
    from pipeline.quantization.calibration.collect import collect
    from pipeline.quantization.calibration.rounding import round_layers
    from pipeline.quantization.calibration.store import save_block, save_whole
    from pipeline.quantization.layers import unfit
    from pipeline.quantization.roundings import rounding

    source = full_model(config, workspace, events)
    refuse_other_matrices(source)
    windows = calibration_text.windows(config, workspace, source, config.quantize.calibration.tokens)
    folder, about = workspace.folder / FOLDER, fingerprint(_rounded_with(config, workspace))
    known, finished = workspace.progress("calibrate", "block"), workspace.ledger().get("calibrate")
    outcome = Outcome((folder,), {"tokens": sum(map(len, windows))})
    if known.get("about") == about and finished and workspace.holds("calibrate", finished.fingerprint):
        return outcome  # only a text that is measured on has changed
    model = BlockwiseModel(source)
    wanted = (config.quantize.spec(name) for name in config.quantize.calibrated)
    specs = [spec for spec in wanted if not unfit(spec, model.linear, source)]  # `quantize` reports the others
    if not specs:
        workspace.note("calibrate", block=None)
        return Outcome((), {"tokens": 0})
    on_grids = {spec.name: grids(spec, model) for spec in specs if spec.need(True) == Need.GRAM_MATRIX}
    first, activations, moments = 0, None, {}
    if known.get("about") == about and (folder / BORDER).is_file():
        kept = load_file(folder / BORDER)
        first = int(kept.pop("block")) + 1
        moments = {name.removeprefix("moments:"): kept.pop(name) for name in list(kept) if name.startswith("moments:")}
        activations = [kept[str(number)] for number in range(len(kept))]
    else:
        empty_folder(folder)
        workspace.note("calibrate", block={"about": about})
    events.progress(first, model.count, "calibrating")
    need = Need.GRAM_MATRIX if on_grids else Need.SECOND_MOMENTS
    for found in collect(model, windows, need, first, activations):
        for spec in specs:
            if spec.name in on_grids:
                how, on = rounding(str(spec.rounding)), on_grids[spec.name]
                here = {name: on[name] for name in found.statistics if name in on}
                made = round_layers(how, model.weight_rows, here, found.statistics)
                save_block(folder / spec.name, found.block, made)
        moments |= {name: of.second_moments.clone() for name, of in found.statistics.items()}  # no shared memory
        save_whole(_border(found.block, moments, found.activations), folder / BORDER)
        events.progress(found.block + 1, model.count, "calibrating")
        del found  # or its Gram matrices would stay in memory until those of the next block are there
    save_whole(moments, folder / STATISTICS)
    (folder / BORDER).unlink()
    return outcome


def grids(spec: VariantSpec, model: BlockwiseModel) -> dict[str, tuple[tuple[int, int], Grid]]:
    """Return shapes and grids of the layers to round with their inputs; the writer rounds layers in eight bits.

    Raises:
        QuantizationError: naming a layer that is outside the decoder blocks.
    """
    from pipeline.quantization.layers import layer_grids, named

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


def _border(block: int, moments: dict, activations: list) -> dict:
    import torch

    kept = {f"moments:{name}": values for name, values in moments.items()}
    return {"block": torch.tensor(block), **kept, **{str(n): hidden for n, hidden in enumerate(activations)}}


def about(config: Config, workspace: Workspace) -> dict:
    """Return the text and the tokens of the finished calibration, for cards."""
    tokens = workspace.ledger()["calibrate"].summary["tokens"]
    return {"calibration_text": calibration_text.about(config), "calibration_tokens": tokens}


def read(config: Config, workspace: Workspace, name: str) -> tuple[dict[str, Statistics], dict[str, RoundedWeights]]:
    """Return the statistics, and the rounded weights of a variant, of a finished calibration."""
    from pipeline.quantization.calibration.store import RoundedFolder, read_statistics
    from pipeline.quantization.statistics import Statistics

    folder, tokens = workspace.folder / FOLDER, config.quantize.calibration.tokens
    moments = read_statistics(folder / STATISTICS)
    made = (workspace.folder / DISTILLED if name in config.quantize.distilled else folder) / name
    rounded: dict[str, RoundedWeights] = {name: RoundedFolder(made)} if made.is_dir() else {}
    return {weight: Statistics(tokens, values) for weight, values in moments.items()}, rounded
