"""Speed and memory of a model, measured in a fresh process for each loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.evaluation.model_result import Speed
from pipeline.inference.loaders import PACKED, STOCK
from pipeline.models.safe_loading import open_config

LOGIT_TOLERANCE = 0.05  # relative; kernels differ by bf16 rounding in each layer


def by_loader(
    folder: Path, ids: list[int], loaders: tuple[str, ...], device: str, lacks: Sequence[str] = ()
) -> dict[str, Speed]:
    """Return the figures by loader; if both loaders run, their logits must agree.

    Args:
        ids: tokens that the model reads.
        loaders: keys of `inference.loaders.TIMED`.
        lacks: packages that the stock loader needs and this machine lacks; then it is not tried.

    Raises:
        ModelError: if `pipeline.load` cannot run the model, or the logits disagree.
    """
    from pipeline.evaluation.load_probe import probe
    from pipeline.inference.load import device_named
    from pipeline.inference.offload import fits

    why = None
    if PACKED in loaders and not fits(folder, device_named(device), stock=True):
        why = "it dequantizes all weights, and they do not fit into the memory"
    tried = [loader for loader in loaders if loader != STOCK or not (lacks or why)]
    probes = {loader: probe(folder, loader, ids, device) for loader in tried}
    figures = {loader: found.figures for loader, found in probes.items()}
    if STOCK not in tried:
        here = figures[PACKED].device
        reason = None if lacks else why
        figures[STOCK] = Speed(loader=STOCK, device=here, runs=False, lacks=tuple(lacks), reason=reason)
    ours = figures.get(PACKED)
    if ours and not ours.runs:
        raise ModelError(f"{folder}: does not run with {PACKED}: {ours.reason}")
    if ours and figures[STOCK].runs and _stock_is_right(folder, device):
        logits, stock = probes[PACKED].logits, probes[STOCK].logits
        assert logits is not None and stock is not None, "a model that runs has logits"
        difference = float((logits - stock).norm() / stock.norm())
        if not difference <= LOGIT_TOLERANCE:  # NaN is neither
            raise ModelError(f"{folder}: logits of {PACKED} differ from the stock loader's by {difference:.1%}")
        figures[PACKED] = ours.model_copy(update={"logits_off_stock": difference})
    return figures


def _stock_is_right(folder: Path, device: str) -> bool:
    """Return False for a variant that torchao multiplies as int8 on a CPU whose int8 products are wrong."""
    from pipeline.inference.kernels.rounded import int8_products_are_exact
    from pipeline.inference.load import device_named
    from pipeline.quantization.formats import rounds_inputs

    on_cpu = device_named(device).type == "cpu"
    return not (on_cpu and rounds_inputs(open_config(folder)) and not int8_products_are_exact())
