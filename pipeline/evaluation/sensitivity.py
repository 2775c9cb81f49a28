"""Sensitivity: the share of each linear layer in the loss of a quantized model.

One gradient pass gives the shares, one decoder block at a time (`quantization.calibration.sensitivities`). The most
sensitive layers are then checked: each is rounded alone in the whole model, and the general text is scored.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import MeasuredRun, VariantSpec
from pipeline.errors import QuantizationError
from pipeline.evaluation.model_result import CheckedLoss, Estimate, LayerLoss
from pipeline.system.files import write_json
from pipeline.system.libraries import quiet

if TYPE_CHECKING:
    import torch

    from pipeline.data.encode import Encoded
    from pipeline.inference.output_head import Head, HeadNames
    from pipeline.quantization.calibration.sensitivities import Sensitivities
    from pipeline.quantization.grid import Grid, GroupQuantized

CHECKED = 5  # layers that are measured alone as well
RESULT, PICTURE = "sensitivity.json", "sensitivity.png"

Tell = Callable[[int, int, str], None]
Shapes = Mapping[str, tuple[int, int]]


def measured(
    spec: VariantSpec,
    calibrates: bool,
    folder: Path,
    grids: Mapping[str, Sequence[Grid]],
    tables: Shapes,
    windows: Sequence[list[int]],
    scratch: Path,
    tell: Tell,
    device: str,
) -> Sensitivities:
    """Measure the sensitivities of the full-precision model in `folder`.

    Args:
        calibrates: the variant will be calibrated.
        grids, tables, windows: as in `quantization.calibration.sensitivities.measure`.
        scratch: an empty folder.
        tell: called with how much is done, of how much, and what.
        device: that the model runs on: `auto`, `cpu` or `cuda`.
    """
    from pipeline.inference.load import device_named
    from pipeline.inference.output_head import head_names
    from pipeline.quantization.calibration.blocks import BlockwiseModel
    from pipeline.quantization.calibration.sensitivities import measure

    model = BlockwiseModel(folder, device=str(device_named(device)))
    heads = _Heads(head_names(model.skeleton), folder, model.device)
    return measure(model, spec, calibrates, grids, tables, windows, heads, scratch, tell)


@dataclass(frozen=True)
class _Heads:
    """The output heads of the full-precision model in a folder, and of rounded ones."""

    names: HeadNames
    folder: Path
    device: torch.device

    @property
    def weight(self) -> str:
        return self.names.weight

    def of(self, rounded: Mapping[str, GroupQuantized]) -> tuple[Head, Head]:
        full = self.names.read(self.folder).to(self.device)
        if self.weight not in rounded:
            return full, full
        return full, self.names.read(self.folder, rounded[self.weight]).to(self.device)


def report(config: MeasuredRun, output: Path, tell: Tell) -> dict:
    """Measure `config.model` with its one variant; write JSON and a picture, and return the content of the JSON.

    Args:
        config: the model, the variant and the text.
        output: folder of the results.
        tell: called with how much is done, of how much, and what.

    Raises:
        UserError: if there is no such model, or if the variant has no grid.
    """
    from pipeline.models.sources import fetch

    quiet()
    (spec,) = config.quantize.variants
    check(spec)
    with tempfile.TemporaryDirectory() as scratch:
        folder, origin = fetch(config.model, Path(scratch), lambda d, t: tell(d, t, "fetching the model"))
        layers = sensitivity(config, spec, folder, tell)
    found = {
        "model": {"source": origin.source, "revision": origin.revision},
        "variant": spec.making(),
        "text": config.evaluate.general,
        "max_tokens": config.evaluate.max_tokens,
        "layers": [layer.to_json() for layer in layers],
    }
    write_json(output / RESULT, found)
    draw(layers, f"{origin.name}: shares of the loss in {spec.name}", output / PICTURE)
    return found


def check(spec: VariantSpec) -> None:
    """Check that single layers of a variant can be rounded.

    Raises:
        QuantizationError: naming the variant.
    """
    if spec.rounding is None:
        can = ", ".join(name for name, variant in VARIANTS.items() if variant.roundings)
        raise QuantizationError(f"{spec.name}: its layers cannot be rounded one by one. Try: one of {can}")


def sensitivity(config: MeasuredRun, spec: VariantSpec, folder: Path, tell: Tell) -> list[LayerLoss]:
    """Measure every linear layer of the full-precision model in `folder`, and check the most sensitive ones.

    Args:
        config: `config.evaluate` has the general text, the number of tokens and the device.
        spec: the variant; layers that it keeps are measured too.
        folder: folder of the full-precision model.
        tell: called with how much is done, of how much, and what.

    Returns:
        The loss of each layer, in the order of the model. If the model is larger than the memory, none is checked.

    Raises:
        QuantizationError: if a layer fits no grid.
        DataError: if there is no such text.
        ModelError: if the text has a token that the model cannot read.
    """
    from pipeline.evaluation import texts
    from pipeline.models.checkpoint_files import read_config
    from pipeline.models.context import context_length
    from pipeline.models.matrices import linear_weights
    from pipeline.models.safe_loading import open_tokenizer
    from pipeline.models.vocabulary_size import check_tokens
    from pipeline.quantization.layers import layer_grids

    linear, tokenizer = linear_weights(folder), open_tokenizer(folder)
    found, _ = layer_grids(spec.model_copy(update={"keep": []}), linear)
    grids = {name: grid for name, (_, grid) in found.items() if grid is not None}
    sequences = texts.general(config, tokenizer, context_length(read_config(folder)))
    check_tokens(folder, tokenizer, (sequence.input_ids for sequence in sequences))
    windows = [sequence.input_ids for sequence in sequences]
    with tempfile.TemporaryDirectory() as scratch:
        base = {name: [grid] for name, grid in grids.items()}
        device = config.evaluate.device
        shares = measured(spec, False, folder, base, {}, windows, Path(scratch), tell, device).shares
    worst = sorted(shares, key=lambda name: -shares[name])[:CHECKED]
    checked = _checked(config, spec, folder, {name: grids[name] for name in worst}, sequences, tell)
    return [
        LayerLoss(
            name=name.removesuffix(".weight"),
            weights=math.prod(linear[name]),
            kl=Estimate(shares.get(name, 0.0)),
            **({"checked": checked[name]} if name in checked else {}),
        )
        for name in linear
    ]


def _checked(
    config: MeasuredRun,
    spec: VariantSpec,
    folder: Path,
    grids: Mapping[str, Grid],
    sequences: list[Encoded],
    tell: Tell,
) -> dict[str, CheckedLoss]:
    """Return the loss of the model if one layer alone is rounded, for each of these; {} if the model is too large."""
    from pipeline.evaluation import metrics
    from pipeline.inference import output_head
    from pipeline.inference.load import device_named, load
    from pipeline.inference.offload import TooLarge, check_fits
    from pipeline.quantization.calibration.sensitivities import stand_in
    from pipeline.quantization.roundings import rounding

    try:
        check_fits(folder, device_named(config.evaluate.device), "checking the most sensitive layers")
    except TooLarge:
        return {}
    tell(0, len(grids), "checking the most sensitive layers")
    model, _ = load(folder, device=config.evaluate.device)
    full, head = metrics.score(model, sequences), output_head.head_of(model)
    how, checked = rounding(stand_in(spec, False)[0]), {}
    for done, (name, grid) in enumerate(grids.items(), start=1):
        weight = model.get_parameter(name)
        kept = weight.data
        try:
            weight.data = how.round(kept.cpu(), grid).dequantize(kept.dtype).to(kept.device)
            scores = metrics.score(model, sequences)
        finally:
            weight.data = kept
        compared = metrics.divergence(scores, head, full, head)
        checked[name] = CheckedLoss(kl=compared.kl, rise=metrics.rise(scores, full))
        tell(done, len(grids), "checking the most sensitive layers")
    return checked


def draw(layers: list[LayerLoss], title: str, path: Path) -> None:
    """Draw the shares of the loss by the position of the layer, with a colour for each kind of layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=160, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    for kind in kinds:
        of_kind = [(i, layer) for i, layer in enumerate(layers) if layer.name.rpartition(".")[2] == kind]
        axes.plot([i for i, _ in of_kind], [layer.kl.value for _, layer in of_kind], "o", markersize=4, label=kind)
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("layer, in the order of the model")
    axes.set_ylabel("share of the KL divergence, nats a token")
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(kinds), 7), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path, metadata={"Software": None})
