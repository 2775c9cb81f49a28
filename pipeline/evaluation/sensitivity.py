"""Sensitivity: the loss of a model if one linear layer alone is quantized, for each linear layer.

The model is in memory once. The weight of a layer is rounded, the general text is scored, and the weight is restored.
Results are recorded after each layer, so that a stopped measurement resumes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import MeasuredRun, VariantSpec
from pipeline.data import general_text
from pipeline.errors import QuantizationError
from pipeline.evaluation.model_result import LayerLoss
from pipeline.quantization.statistics import check_collected
from pipeline.system.files import fingerprint, read_json, states, write_json
from pipeline.system.libraries import quiet

if TYPE_CHECKING:
    import torch

    from pipeline.quantization.grid import Grid

TOKENS = 2048  # of general text, for each layer; few are enough because comparisons are paired
RECORD, RESULT, PICTURE = "sensitivity.partial.json", "sensitivity.json", "sensitivity.png"

Tell = Callable[[int, int, str], None]


def report(config: MeasuredRun, output: Path, tell: Tell) -> dict:
    """Measure `config.model` with its one variant; write JSON and a picture, and return the content of the JSON.

    Args:
        config: the model, the variant and the text.
        output: folder of the results.
        tell: called with how much is done, of how much, and what.

    Raises:
        UserError: if there is no such model, or if the variant has no grid.
    """
    import tempfile

    from pipeline.models.sources import digest_here, fetch

    quiet()
    (spec,) = config.quantize.variants
    check(spec)
    with tempfile.TemporaryDirectory() as scratch:
        folder, origin = fetch(config.model, Path(scratch), lambda d, t: tell(d, t, "fetching the model"))
        made_of = origin.revision
        if folder.is_relative_to(scratch):  # the same model, unpacked again
            made_of = digest_here(config.model.source)
        known, keep = read_json(output / RECORD, {}), functools.partial(write_json, output / RECORD)
        layers = sensitivity(config, spec, folder, known, keep, tell, made_of)
    found = {
        "model": {"source": origin.source, "revision": origin.revision},
        "variant": spec.making(),
        "text": config.evaluate.general,
        "max_tokens": config.evaluate.max_tokens,
        "layers": [layer.to_json() for layer in layers],
    }
    write_json(output / RESULT, found)
    (output / RECORD).unlink()
    draw(layers, f"{origin.name}: one layer at a time in {spec.name}", output / PICTURE)
    return found


def check(spec: VariantSpec) -> None:
    """Check that single layers of a variant can be rounded.

    Raises:
        QuantizationError: naming the variant.
    """
    if spec.rounding is None:
        can = ", ".join(name for name, variant in VARIANTS.items() if variant.roundings)
        raise QuantizationError(f"{spec.name}: its layers cannot be rounded one by one. Try: one of {can}")
    check_collected(spec, {})


def sensitivity(
    config: MeasuredRun,
    spec: VariantSpec,
    folder: Path,
    known: Mapping,
    keep: Callable[[dict], None],
    tell: Tell,
    made_of: object = None,
    tokens: int | None = None,
) -> list[LayerLoss]:
    """Measure every linear layer of the full-precision model in `folder`.

    Args:
        config: `config.evaluate` has the general text, the number of tokens and the device.
        spec: the variant; layers that it keeps are measured too.
        folder: folder of the full-precision model.
        known: the last recorded results, if there are any.
        keep: records the results after each layer.
        tell: called with how much is done, of how much, and what.
        made_of: a value that identifies the model; None for the sizes and times of its files.
        tokens: measure on so many tokens of general text that a gate does not measure; None for the measured text.

    Returns:
        The loss of each layer, in the order of the model.

    Raises:
        QuantizationError: if a layer fits no grid.
        DataError: if there is no such text.
        ModelError: if the text has a token that the model cannot read.
        TooLarge: if a layer is not measured yet and the model is larger than the memory.
    """
    from pipeline.evaluation import metrics, texts
    from pipeline.inference import output_head
    from pipeline.inference.load import device_named, load
    from pipeline.inference.offload import check_fits
    from pipeline.models.context import context_length
    from pipeline.models.matrices import linear_weights
    from pipeline.models.vocabulary_size import check_tokens
    from pipeline.quantization.layers import layer_grids

    linear = linear_weights(folder)
    grids, _ = layer_grids(spec.model_copy(update={"keep": []}), linear)
    about = {
        "spec": {**spec.making(), "keep": []},
        "text": fingerprint(general_text(config.evaluate.general)),
        "max_tokens": config.evaluate.max_tokens,
        "unmeasured": tokens,
        "model": fingerprint(made_of or states([*sorted(folder.glob("*.safetensors")), folder / "config.json"])),
    }
    found = known["layers"] if known.get("about") == about else {}
    if missing := [name for name in linear if name not in found]:
        check_fits(folder, device_named(config.evaluate.device), "measuring layer by layer")
        tell(len(found), len(linear), "measuring layers")
        model, tokenizer = load(folder, device=config.evaluate.device)
        context = context_length(model.config.to_dict())
        if tokens is None:
            sequences = texts.general(config, tokenizer, context)
        else:
            sequences = texts.general_unmeasured(config, tokenizer, context, tokens)
        check_tokens(folder, tokenizer, (sequence.input_ids for sequence in sequences))
        full, head = metrics.score(model, sequences), output_head.head_of(model)
        for name in missing:
            weight = model.get_parameter(name)
            kept, grid = weight.data, grids[name][1]
            assert grid is not None, "variants that are rounded have grids"
            try:
                weight.data = _rounded(kept, grid, str(spec.rounding))
                scores = metrics.score(model, sequences)
            finally:
                weight.data = kept
            compared = metrics.divergence(scores, head, full, head)
            found[name] = LayerLoss(kl=compared.kl, rise=metrics.rise(scores, full)).to_json()
            keep({"about": about, "layers": found})
            tell(len(found), len(linear), "measuring layers")
    return [LayerLoss(name=n.removesuffix(".weight"), weights=math.prod(linear[n]), **found[n]) for n in linear]


def draw(layers: list[LayerLoss], title: str, path: Path) -> None:
    """Draw the KL divergence by the position of the layer, with a colour for each kind of layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=160, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    for kind in kinds:
        of_kind = [(i, layer) for i, layer in enumerate(layers) if layer.name.rpartition(".")[2] == kind]
        axes.errorbar(
            [i for i, _ in of_kind], [layer.kl.value for _, layer in of_kind],
            yerr=[layer.kl.stderr for _, layer in of_kind], fmt="o", markersize=4, elinewidth=0.8, label=kind,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("layer, in the order of the model")
    axes.set_ylabel("KL divergence, nats a token")
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(kinds), 7), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path, metadata={"Software": None})


def _rounded(weight: torch.Tensor, grid: Grid, how: str) -> torch.Tensor:
    """Return a weight (N, K) after rounding, in its own type and on its own device."""
    from pipeline.quantization.roundings import rounding

    return rounding(how).round(weight.cpu(), grid).dequantize(weight.dtype).to(weight.device)
