"""Memory of stages in bytes, by part: weights, optimizer, activations, caches.

The counts follow the tensors that the libraries keep for the backward pass, seen with torch's saved-tensor hooks. The
constants were measured on processes; `scripts/benchmark_plan.py` compares both with real stages. CUDA has the same
formulas, and was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.config.catalog import Need as Statistic
from pipeline.config.schema import Quantize, VariantSpec
from pipeline.models.layer_layouts import layout
from pipeline.planning.model import Sizes
from pipeline.system.hardware import compute_bytes_here, cores

Need = dict[str, int]  # part -> bytes

MB = 1_000_000
# Of idle processes that have imported a stage's libraries, with a CPU build of torch.
LIBRARIES = {"train": 580 * MB, "merge": 390 * MB, "compare": 510 * MB, "evaluate": 390 * MB, "quantize": 240 * MB}
SKELETON = 130 * MB  # of transformers, if it must build the model to find its linear layers
CUDA_LIBRARIES = 2500 * MB  # additional main memory of a CUDA build of torch
CUDA_CONTEXT = 700 * MB  # GPU memory in use before the first tensor
# Stages keep the memory that they free (`process_environment.ALLOCATOR`). These factors count its holes, which blocks
# of other sizes leave, and a layer's intermediate results.
HOLES = 1.5
MEASURING_HOLES = 1.1  # while models are scored and compared one after another
MAPPED = "pages of the files"  # count as resident; the system takes them back if memory is short
PASS_HOLES = 1.2  # the passes of a calibration give freed buffers back
DISTILLED_TOGETHER = 16 * 2048  # tokens: `quantization.distillation.TOGETHER` batches
CALIBRATED_TOKENS = 2048  # `quantization.calibration.collect.BATCH_TOKENS`
GRADIENT_TOKENS = 4096  # `quantization.calibration.sensitivities.GRADIENT_TOKENS`
GRADIENT_LOGITS = 24  # bytes per logit: float32 six times
SCORED_TOKENS = 2048  # `evaluation.metrics.BATCH_TOKENS`
LOGITS = 1 << 24  # `inference.output_head.LOGIT_ELEMENTS`
LOGITS_BYTES = 30  # per logit: float32 seven and a half times, while two models are compared
HEAD = 1 << 25  # `inference.output_head.HEAD_ELEMENTS`
LLAMA_CPP = 100 * MB  # of a process without torch; the stage has closed the file before
PROBE = 70 * MB  # for the work of a load probe
RANGE = 4 * 512  # the counts of a channel (`quantization.input_range.BINS`)
BLOCK = 4 * MB  # `row_blocks.BLOCK_BYTES`


def total(need: Need) -> int:
    """Return the bytes of all parts."""
    return sum(need.values())


def wanted(need: Need) -> int:
    """Return the bytes that must be free: all parts except pages that the system can take back."""
    return total(need) - need.get(MAPPED, 0)


def passing(sizes: Sizes, libraries: int, variants: int) -> Need:
    """Return the memory of one pass over the files: a block and its results in each thread."""
    return {"libraries": libraries, "blocks": cores() * BLOCK * (8 + variants)}


def with_gram_matrices(quantize: Quantize) -> list[VariantSpec]:
    """Return the variants that a calibration rounds with whole Gram matrices."""
    return [spec for spec in quantize.variants if spec.need(quantize.calibrates) == Statistic.GRAM_MATRIX]


def gram_sizes(sizes: Sizes) -> list[int]:
    """Return the widths of the inputs of one decoder block that differ: norms twice, attention, and feed-forward."""
    return [sizes.hidden, sizes.hidden, sizes.attention, sizes.intermediate]


def calibrating(sizes: Sizes, quantize: Quantize) -> Need:
    """Return the memory of a calibration: a block, its statistics, and the activations at its border."""
    tokens, width = quantize.calibration.tokens, compute_bytes_here()
    batch = CALIBRATED_TOKENS * (4 * sizes.hidden + 3 * sizes.attention + 3 * sizes.intermediate)
    need = {
        "libraries": LIBRARIES["evaluate"],
        "block": width * sizes.linear_parameters // sizes.layers,
        "activations": int(PASS_HOLES * width * (tokens * sizes.hidden + batch)),
    }
    if quantize.needs_ranges:
        need["ranges of channels"] = RANGE * (sum(gram_sizes(sizes)) + 4 * max(gram_sizes(sizes)))
        need["changed weights"] = need["block"]
    embedding = {"embedding": 2 * sizes.vocabulary * sizes.hidden}  # before the first block only
    rounding = {}
    if with_gram_matrices(quantize):
        rows, columns = max(sizes.linear.values(), key=math.prod, default=(0, 0))
        copies = 2 if any(spec.variant.static_inputs for spec in with_gram_matrices(quantize)) else 1
        matrices = copies * sum(k**2 for k in gram_sizes(sizes))
        rounding["gram matrices"] = 4 * matrices + 3 * 4 * max(gram_sizes(sizes)) ** 2
        rounding["rounding"] = 4 * 4 * rows * columns
    return need | max(embedding, rounding, key=total)


def allocating(sizes: Sizes, quantize: Quantize) -> Need:
    """Return the memory of measuring what layers lose: a calibration, or the gradient pass, whichever takes more."""
    width, table = compute_bytes_here(), sizes.vocabulary * sizes.hidden
    collected = calibrating(sizes, quantize.model_copy(update={"variants": []}))
    batch = CALIBRATED_TOKENS * (10 * sizes.hidden + 8 * sizes.attention + 6 * sizes.intermediate)
    block = sizes.linear_parameters // sizes.layers
    need = {
        "libraries": LIBRARIES["evaluate"],
        "block": (2 * width + 4) * block,  # in full precision, rounded, and its gradient
        "tables": 3 * table + 2 * 4 * min(HEAD, table),  # in bf16, in eight bits, and pieces of both in float32
        "activations": int(HOLES * width * (3 * GRADIENT_TOKENS * sizes.hidden + batch)),
        "logits": GRADIENT_LOGITS * LOGITS,
    }
    return max(collected, need, key=total)


def distilling(sizes: Sizes, quantize: Quantize) -> Need:
    """Return the memory of training scales and zeros: a block, the output head, and all values with their moments."""
    width, table = compute_bytes_here(), sizes.vocabulary * sizes.hidden
    batch = CALIBRATED_TOKENS * (10 * sizes.hidden + 8 * sizes.attention + 6 * sizes.intermediate)
    specs = (quantize.spec(name) for name in quantize.distilled)
    tokens = min(quantize.distillation.tokens, DISTILLED_TOGETHER)
    block = (2 * width + 9) * (sizes.linear_parameters // sizes.layers)  # exact, rounded, codes, and gradients
    groups = max(sizes.linear_parameters // (spec.group_size or sizes.hidden) for spec in specs)
    return {
        "libraries": LIBRARIES["evaluate"],
        "scales and zeros": 2 * 16 * groups,  # in float32, with a gradient and two moments
        "tables": 2 * table + 4 * min(HEAD, table),
        "activations": int(PASS_HOLES * width * (tokens * sizes.hidden + batch)),
        "block, or logits": max(block, GRADIENT_LOGITS * LOGITS),
    }


def quantizing(sizes: Sizes, specs: Sequence[VariantSpec]) -> Need:
    """Return the memory of the pass, and of llama.cpp's quantizer, which takes one float32 tensor at a time."""
    skeleton = 0 if layout(sizes.config) else SKELETON
    need = passing(sizes, LIBRARIES["quantize"] + skeleton, len(specs))
    if any(spec.quantizer for spec in specs):
        need["llama.cpp's quantizer"] = PROBE + 8 * max(tensor.numel for tensor in sizes.tensors.values())
    return need


def measuring(
    sizes: Sizes, weights: int, on_gpu: bool, max_tokens: int, holes: float = MEASURING_HOLES
) -> tuple[Need, Need]:
    """Return main memory and GPU memory of scoring texts with a model, and comparing it with a reference.

    Only the reference's hidden states and output head are in memory.

    Args:
        weights: bytes of the model.
        holes: factor for the holes in the memory.
    """
    layer = SCORED_TOKENS * (10 * sizes.hidden + 8 * sizes.attention + 6 * sizes.intermediate)
    table = sizes.vocabulary * sizes.hidden
    work = {
        "logits": LOGITS_BYTES * LOGITS,
        "output heads": 4 * min(HEAD, table) + 2 * table,
        "hidden states": 2 * 2 * 2 * sizes.hidden * max_tokens,
    }
    if on_gpu:  # texts are scored there, but models are compared in main memory
        gpu = {"weights": weights, "activations": layer, "logits": 16 * LOGITS, "output head": 4 * min(HEAD, table)}
        return {"libraries": LIBRARIES["evaluate"] + CUDA_LIBRARIES, **work}, {"CUDA itself": CUDA_CONTEXT, **gpu}
    work = {part: int(holes * count) for part, count in {"activations": layer, **work}.items()}
    return {"libraries": LIBRARIES["evaluate"], "weights": weights, **work}, {}


def probed(host: Need, weights: int, on_gpu: bool) -> Need:
    """Return a stage's memory while a fresh process loads the model again to measure its speed.

    On a CPU the stage still has the weights, because its output head lies in the same mapping.
    """
    fresh = LIBRARIES["evaluate"] + PROBE + (CUDA_LIBRARIES if on_gpu else weights)
    return host | {"a fresh process": fresh}


def in_llama_cpp(sizes: Sizes, stored: int, max_tokens: int) -> Need:
    """Return the memory of measuring a GGUF in llama.cpp: the stage, then a fresh process, holds the file."""
    return measuring(sizes, stored, False, max_tokens)[0] | {"a fresh process": LLAMA_CPP}


def offloaded(sizes: Sizes, max_tokens: int) -> Need:
    """Return the memory of measuring a model from its files: the widest layer and the output head."""
    widest = 2 * max(sizes.widest, sizes.vocabulary * sizes.hidden)
    return measuring(sizes, 2 * widest, False, max_tokens)[0]
