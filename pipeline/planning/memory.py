"""Memory of stages in bytes, by part: weights, optimizer, activations, caches.

The counts follow the tensors that the libraries keep for the backward pass, seen with torch's saved-tensor hooks. The
constants were measured on processes; `scripts/benchmark_plan.py` compares both with real stages. CUDA has the same
formulas, and was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.config.catalog import Need as Statistic
from pipeline.config.schema import Config, MeasuredRun, Quantize, Train, VariantSpec
from pipeline.config.training_catalog import METHODS, NF4_BASE, TRAINERS
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
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # a code, an 8-bit scale for 64 codes, a scale for 256 scales
# Stages keep the memory that they free (`process_environment.ALLOCATOR`). These factors count its holes, which blocks
# of other sizes leave, and a layer's intermediate results.
HOLES = 1.5
MEASURING_HOLES = 1.1  # while models are scored and compared one after another
COMPARED_HOLES = 1.3  # while three models with blocks of the same sizes follow one another
CUDA_HOLES = 1.15  # torch's own allocator fills its blocks better
MAPPED = "pages of the files"  # count as resident; the system takes them back if memory is short
LOSS_TOKENS, LOSS_COLUMNS = 4096, 32768  # of one tile of logits, as trl computes them on a GPU
TRAINED_LOGITS = 1 << 23  # `training.fused_loss.LOGIT_ELEMENTS`
TRAINED_LOGIT_BYTES = 14  # per logit: float32 three times, or twice and the tile in bf16
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
BLOCK = 4 * MB  # `row_blocks.BLOCK_BYTES`


def total(need: Need) -> int:
    """Return the bytes of all parts."""
    return sum(need.values())


def wanted(need: Need) -> int:
    """Return the bytes that must be free: all parts except pages that the system can take back."""
    return total(need) - need.get(MAPPED, 0)


def adapter_parameters(sizes: Sizes, train: Train) -> int:
    """Return the parameters of a LoRA adapter: two factors of its rank for each layer, and modules trained whole.

    There are none if the method trains no adapter.
    """
    if not train.adapts:
        return 0
    lora = train.lora
    whole = tuple(f".{name}.weight" for name in lora.options.get("modules_to_save") or ())
    saved = sum(tensor.numel for name, tensor in sizes.tensors.items() if f".{name}".endswith(whole)) if whole else 0
    return saved + sum(lora.rank * (rows + width) for rows, width in sizes.trained(lora).values())


def trained_parameters(sizes: Sizes, train: Train) -> int:
    """Return the parameters that are trained: those of the adapter, or all of the model."""
    return adapter_parameters(sizes, train) if train.adapts else sizes.parameters


def held_weights(sizes: Sizes, in_nf4: bool, other_bytes: int = 2) -> int:
    """Return the bytes of the base in training: linear layers in NF4 or bf16, embeddings in bf16.

    Args:
        other_bytes: bytes of each other number, which a CPU holds in its compute type.
    """
    tables = sum(rows * width for rows, width in sizes.tables.values())
    others = sizes.parameters - sizes.linear_parameters - tables
    return int(sizes.linear_parameters * (NF4_BYTES if in_nf4 else 2)) + 2 * tables + other_bytes * others


def training(sizes: Sizes, train: Train, on_gpu: bool) -> tuple[Need, Need]:
    """Return main memory and GPU memory of training; by default only a GPU has gradient checkpointing."""
    in_nf4 = METHODS[train.method].in_nf4
    tokens = train.batch_size * TRAINERS[train.trainer].sequences * train.max_length
    trained = trained_parameters(sizes, train)
    small_states = on_gpu and train.optimizer != "adamw" or train.optimizer == "paged_adamw_8bit"
    width = 2 if on_gpu else compute_bytes_here()
    states = 2 if small_states else 8
    if train.adapts:
        held = {
            "weights": held_weights(sizes, in_nf4, width),
            "adapter and optimizer": trained * (4 + 4 + states),
        }
    else:
        held = {
            "weights": 4 * trained,
            "gradients and optimizer": trained * (4 + states),
            "weights in bf16": 2 * trained if width == 2 else 0,  # copies that autocast keeps for a step
        }
    if train.qat:  # one weight at a time, computed in parts
        held["rounded weight"] = 4 * sizes.widest + (200_000_000 if on_gpu else 20_000_000)
    if not on_gpu:
        layer = tokens * (_kept_on_cpu if train.adapts else _kept_by_whole_layer)(sizes, train, width)
        kept = _kept_layers(sizes, train, layer, layer, width=width, by_default=False)
        held["activations"] = int(HOLES * kept)
        held["mask"] = tokens**2 if train.packs else 0  # booleans for all packed sequences together
        held["logits"] = min(tokens * sizes.vocabulary, TRAINED_LOGITS) * TRAINED_LOGIT_BYTES
        return {"libraries": LIBRARIES["train"], **held}, {}
    layer = tokens * (_kept_on_gpu(sizes, train) if train.adapts else _kept_by_whole_layer(sizes, train, width))
    # Packed sequences lie in one row, so the mask has an entry for every pair of tokens.
    mask = 2 * (tokens**2 if train.packs else tokens * train.max_length)
    held["activations"] = int(
        CUDA_HOLES * (_kept_layers(sizes, train, layer, 2 * layer, width=2, by_default=True) + 3 * mask)
    )
    held["logits"] = 2 * min(tokens, LOSS_TOKENS) * min(sizes.vocabulary, LOSS_COLUMNS) + 8 * sizes.hidden * tokens
    held["dequantized weights"] = 2 * 2 * sizes.widest if in_nf4 else 0
    host = {"libraries": LIBRARIES["train"] + CUDA_LIBRARIES, MAPPED: sizes.shard_bytes}
    return host, {"CUDA itself": CUDA_CONTEXT, **held}


def _kept_layers(sizes: Sizes, train: Train, layer: int, again: int, width: int, by_default: bool) -> int:
    """Return the bytes that the layers keep together: all of each, or its input and the one that is computed again.

    Args:
        layer: bytes of one layer.
        again: bytes of the layer that is computed again.
        width: bytes of a number of a layer's input.
        by_default: True if gradient checkpointing is the default.
    """
    asked = train.gradient_checkpointing
    if not (by_default if asked is None else asked):
        return sizes.layers * layer
    tokens = train.batch_size * TRAINERS[train.trainer].sequences * train.max_length
    return width * sizes.hidden * tokens * sizes.layers + again


def _kept_on_cpu(sizes: Sizes, train: Train, width: int) -> int:
    """Return the bytes per token that one layer keeps for the backward pass, with our fused layers.

    Two norms keep their input in float32 and their output in the compute type. Attention keeps queries, keys, values,
    a mask, and its result twice. The feed-forward part keeps its two halves. An adapter with dropout keeps a boolean
    for each number of its input.

    Args:
        width: bytes of a number in the compute type.
    """
    attention = 3 * sizes.attention + 2 * sizes.keys
    mask = train.max_length // 2 if train.packs else train.max_length
    plain = 8 * sizes.hidden + width * (2 * sizes.hidden + attention + mask + 2 * sizes.intermediate)
    adapted = sizes.trained(train.lora).values()
    inputs = sum(width for _, width in adapted) // sizes.layers
    return plain + len(adapted) // sizes.layers * train.lora.rank * width + (inputs if train.lora.dropout else 0)


def _kept_on_gpu(sizes: Sizes, train: Train) -> int:
    """Return the bytes per token that one layer of transformers keeps for the backward pass.

    Two norms keep float32. Attention keeps queries, keys and values (repeated for all heads), and its result. The
    feed-forward part keeps its gate, the activated gate and the other half. An adapter keeps its input in bf16, and
    with dropout a mask in the type that it is computed in.
    """
    plain = 8 * sizes.hidden + 8 * sizes.attention + 6 * sizes.intermediate
    inputs = sum(width for _, width in sizes.trained(train.lora).values()) // sizes.layers
    dropped = METHODS[train.method].dropout_bytes if train.lora.dropout else 0
    return plain + inputs * (2 + dropped)


def _kept_by_whole_layer(sizes: Sizes, train: Train, width: int) -> int:
    """Return the bytes per token that one layer keeps for the backward pass if its own weights are trained.

    It is what transformers keeps, and the input of each linear layer. A CPU also keeps a mask, and attention twice.

    Args:
        width: bytes of a number in the compute type.
    """
    inputs = sum(columns for _, columns in sizes.linear.values()) // sizes.layers
    mask = train.max_length // 2 if train.packs else train.max_length
    return 8 * sizes.hidden + width * (5 * sizes.attention + 3 * sizes.intermediate + inputs + mask)


def merging(sizes: Sizes, config: Config, kinds: tuple[str, ...], variants: int, on_gpu: bool) -> tuple[Need, Need]:
    """Return main memory and GPU memory of the merge, and of comparing two bases if both are merged."""
    need = passing(sizes, LIBRARIES["merge"], variants)
    if NF4_BASE in kinds:
        need["weights in NF4"] = int(cores() * sizes.widest * 0.7)
    if len(kinds) == 1 or not isinstance(config, MeasuredRun):
        return need, {}
    live = held_weights(sizes, in_nf4=True) + 4 * adapter_parameters(sizes, config.train)
    weights = max(live, sizes.bf16_bytes) if on_gpu else live
    host, gpu = measuring(sizes, weights, on_gpu, config.evaluate.max_tokens, COMPARED_HOLES)
    host["libraries"] += LIBRARIES["compare"] - LIBRARIES["evaluate"]
    # On a CPU the base with its adapter comes first, then each merged model, mapped from its files.
    return max(need, host if on_gpu else host | {MAPPED: sizes.bf16_bytes}, key=total), gpu


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
    embedding = {"embedding": 2 * sizes.vocabulary * sizes.hidden}  # before the first block only
    rounding = {}
    if with_gram_matrices(quantize):
        rows, columns = max(sizes.linear.values(), key=math.prod, default=(0, 0))
        rounding["gram matrices"] = 4 * sum(k**2 for k in gram_sizes(sizes)) + 3 * 4 * max(gram_sizes(sizes)) ** 2
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
