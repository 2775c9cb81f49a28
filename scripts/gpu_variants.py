"""GPU checks of quantized variants: every packing of the catalogue in every loader, offloaded and compiled models."""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_place import Figures, NotHere, Place, Wrong, check_logits, free_gpu, ids_of, logits, rate

from pipeline.config.catalog import DEFAULT_VARIANTS, TRANSFORMERS, VARIANTS, Need
from pipeline.config.engines import CPU, CUDA, TUNEPRESS
from pipeline.config.schema import VariantSpec
from pipeline.evaluation.speed import LOGIT_TOLERANCE
from pipeline.inference.loaders import PACKED, STOCK
from pipeline.system.libraries import is_installed, lacking

if TYPE_CHECKING:
    import torch

LOADERS = {TRANSFORMERS: STOCK, TUNEPRESS: PACKED}  # engine -> loader
ROUNDED_INPUTS = 0.3  # how far logits may be from those of the dequantized weights, if layers round their inputs
SANE = 0.7  # how far logits of a variant without such a reference may be from those of the full-precision model
NEW_TOKENS, PROMPT_TOKENS = 16, 64


def specs() -> dict[str, VariantSpec]:
    """Return every variant in every packing, by the name of its check: `int4`, `int4:tile_packed`, ..."""
    found = {}
    for name, variant in VARIANTS.items():
        default = VariantSpec(name=name).resolved()
        found[name] = default
        for packing in list(variant.packings)[1:]:
            found[f"{name}:{packing}"] = default.model_copy(update={"packing": packing})
    return dict(sorted(found.items(), key=lambda item: item[1].variant.is_one_file))


def calibrated() -> list[str]:
    """Return the variants that the check of calibration makes: a default one, and those that need statistics."""
    needing = [name for name, spec in specs().items() if spec.need(False) != Need.NOTHING]
    return [next(name for name in DEFAULT_VARIANTS if VARIANTS[name].has_few_bits), *needing]


def check(place: Place, name: str) -> Figures:
    """Write a variant, load it with each loader that runs it here, and compare logits and speed."""
    spec = specs()[name]
    if lacks := [module for module, _ in spec.requires if not is_installed(module)]:
        raise NotHere(f"writing it needs {', '.join(lacks)}")
    if spec.need(False) != Need.NOTHING:
        raise NotHere("needs calibration text; see calibration")
    folder = write(place, name, spec)
    return _one_file(place, folder) if spec.variant.is_one_file else _by_loader(place, spec, folder)


def write(place: Place, name: str, spec: VariantSpec) -> Path:
    """Write a variant of the full-precision model into a folder named after its check."""
    from pipeline.models.matrices import quantizable_weights, table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    folder = place.folder / "variants" / name
    tables = table_weights(place.model) if spec.quantizes_embeddings or spec.quantizer else {}
    quantize_checkpoint(place.model, [spec], {spec.name: folder}, quantizable_weights(place.model), tables=tables)
    return folder


def _by_loader(place: Place, spec: VariantSpec, folder: Path) -> Figures:
    from pipeline.inference.load import load
    from pipeline.models.safe_loading import open_model

    why_not = {engine: _obstacle(place, spec, engine) for engine in LOADERS}
    if all(why_not.values()):
        raise NotHere("; ".join(filter(None, why_not.values())))
    ids, figures = ids_of(place.model), {}
    expected, allowed = _expected(place, spec, folder, ids)
    for engine, loader in LOADERS.items():
        if why_not[engine]:
            figures[loader] = why_not[engine]
            continue
        on = {"device_map": place.device} if place.device == "cuda" else {}
        free_gpu()
        if engine == TRANSFORMERS:
            model = open_model(folder, dtype="auto", **on)
        else:
            model, _ = load(folder, device=place.device)
        off = check_logits(loader, logits(model, ids), expected, allowed)
        figures[loader] = f"off {off}, {rate(decode_speed(model))}"
        del model
    return figures | {"bf16": rate(full_precision(place)[1])}


def _obstacle(place: Place, spec: VariantSpec, engine: str) -> str | None:
    """Return the reason why an engine does not run a variant on this machine; None if it should."""
    import torch

    from pipeline.models.matrices import quantizable_weights

    hardware = CUDA if place.device == "cuda" else CPU
    ways = [way for way in spec.variant.ways(spec.packing) if way.engine == engine and way.hardware == hardware]
    reasons = []
    for way in ways:
        if way.capability and torch.cuda.get_device_capability() < tuple(map(int, divmod(way.capability * 10, 10))):
            reasons.append(f"needs {way.place}")
        elif lacks := lacking(way.packages):
            reasons.append(f"needs {', '.join(lacks)}")
        elif misfit := way.misfit(quantizable_weights(place.model).values()):
            reasons.append(misfit)
        elif not way.computes:
            reasons.append("only stored")
        else:
            return None
    return reasons[0] if reasons else f"not on {hardware}"


@functools.cache
def full_precision(place: Place) -> tuple[torch.Tensor, float]:
    """Return the logits of the full-precision model on the device, and the tokens per second that it writes."""
    from pipeline.inference.load import load

    model, _ = load(place.model, device=place.device)
    return logits(model, ids_of(place.model)), decode_speed(model)


def decode_speed(model: Any) -> float:
    """Return the tokens per second that a model writes at batch size 1."""
    from pipeline.evaluation.generation import speed

    return speed(model, PROMPT_TOKENS, NEW_TOKENS, 1)["decode_tokens_per_second"]


def _expected(place: Place, spec: VariantSpec, folder: Path, ids: list[int]) -> tuple[torch.Tensor, float]:
    """Return the logits that the stored codes mean, computed on dequantized weights, and the allowed distance."""
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.matrices import linear_weights
    from pipeline.models.safe_loading import open_model
    from pipeline.quantization.formats import format_of

    model, stored, form = open_model(place.model, dtype="float32"), Checkpoint(folder), format_of(spec)
    quantized = set(form.weights(stored))
    linear = {name: shape for name, shape in linear_weights(place.model).items() if name in quantized}
    if not linear:
        raise Wrong("no layer is quantized")
    for name, shape in linear.items():
        model.get_submodule(name.removesuffix(".weight")).weight.data = form.read(stored, name, shape).dequantize()
    rounds = spec.variant.rounds_inputs or spec.variant.static_inputs
    return logits(model.to(place.device), ids), ROUNDED_INPUTS if rounds else LOGIT_TOLERANCE


def _one_file(place: Place, folder: Path) -> Figures:
    """Load the dequantized weights of a file on the device; on a GPU, compare with the same on the CPU."""
    from pipeline.inference.load import load_dequantized
    from pipeline.inference.loaders import only_file

    file, ids = only_file(folder), ids_of(place.model)
    if file is None:
        raise Wrong("wrote no file")
    found = logits(load_dequantized(file, place.model, place.device)[0], ids)
    figures: Figures = {"from bf16": check_logits("dequantized", found, full_precision(place)[0], SANE)}
    if place.device != "cpu":
        expected = logits(load_dequantized(file, place.model, "cpu")[0], ids)
        figures["from the CPU"] = check_logits("dequantized", found, expected)
    return figures


def offload(place: Place) -> Figures:
    """Load models with weights left in their files, and compare their logits with those of whole models."""
    import torch

    from pipeline.inference.load import load
    from pipeline.models.checkpoint_files import stored_bytes

    figures: Figures = {}
    for name in ("bf16", DEFAULT_VARIANTS[0]):
        folder = place.model if name == "bf16" else write(place, name, specs()[name])
        ids = ids_of(place.model)
        expected = logits(load(folder, device=place.device)[0], ids)
        free_gpu()
        found = logits(load(folder, device=place.device, offload=True)[0], ids)
        figures[f"{name} off"] = check_logits(name, found, expected)
        if place.device == "cuda":
            peak, held = torch.cuda.max_memory_allocated(), stored_bytes(place.model)
            figures[f"{name} MB"] = f"{peak / 1e6:.0f} of {held / 1e6:.0f}"
            if peak > 0.9 * held:
                raise Wrong(f"{name}: the GPU held {peak / 1e6:.0f} MB, and all weights are {held / 1e6:.0f} MB")
    return figures


def compiled(place: Place) -> Figures:
    """Write tokens with a compiled step, and compare them and the speed with the step as it is."""
    import shutil

    from pipeline.inference.load import load

    if not (is_installed("triton") if place.device == "cuda" else shutil.which("g++") or shutil.which("clang++")):
        raise NotHere(f"torch.compile needs {'triton' if place.device == 'cuda' else 'a C++ compiler'}")
    figures: Figures = {}
    for name in ("bf16", *DEFAULT_VARIANTS):
        folder = place.model if name == "bf16" else write(place, name, specs()[name])
        model, _ = load(folder, device=place.device)
        (plain, slow), (tokens, fast) = (_write_tokens(model, ids_of(place.model), way) for way in (False, True))
        same = int((plain == tokens).int().cumprod(0).sum())
        figures[name] = f"{rate(fast)}, not compiled {rate(slow)}, {same} of {len(plain)} the same"
        if same < 2:
            raise Wrong(f"{name}: the first token of the compiled step differs")
    return figures


def _write_tokens(model: Any, ids: list[int], compiles: bool) -> tuple[torch.Tensor, float]:
    """Return greedy tokens, and how many a second after a first round (median)."""
    import torch
    from transformers import StaticCache

    step = torch.compile(model.forward, dynamic=False) if compiles else model.forward
    prompt, tokens, seconds = torch.tensor([ids], device=model.device), [], []
    cache = StaticCache(config=model.config, max_cache_len=len(ids) + NEW_TOKENS)
    with torch.no_grad():
        for _ in range(2):  # the first round compiles
            cache.reset()
            seconds, tokens = [], [model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)]
            for _ in range(NEW_TOKENS):
                int(tokens[-1])  # waits for the device
                start = time.perf_counter()
                tokens.append(step(tokens[-1], past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))
                int(tokens[-1])
                seconds.append(time.perf_counter() - start)
    return torch.cat(tokens, 1)[0].cpu(), 1 / statistics.median(seconds)
