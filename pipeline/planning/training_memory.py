"""Memory of training and of merging, in bytes by part; see `memory` for how the numbers were found."""

from __future__ import annotations

from pipeline.config.schema import Config, MeasuredRun, Train
from pipeline.config.training_catalog import METHODS, NF4_BASE, TRAINERS
from pipeline.planning.memory import (
    CUDA_CONTEXT,
    CUDA_LIBRARIES,
    HOLES,
    LIBRARIES,
    MAPPED,
    Need,
    measuring,
    passing,
    total,
)
from pipeline.planning.model import Sizes
from pipeline.system.hardware import compute_bytes_here, cores

NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # a code, an 8-bit scale for 64 codes, a scale for 256 scales
LOSS_TOKENS, LOSS_COLUMNS = 4096, 32768  # of one tile of logits, as trl computes them on a GPU
TRAINED_LOGITS = 1 << 23  # `training.fused_loss.LOGIT_ELEMENTS`
TRAINED_LOGIT_BYTES = 14  # per logit: float32 three times, or twice and the tile in bf16
CUDA_HOLES = 1.15  # torch's own allocator fills its blocks better
COMPARED_HOLES = 1.3  # while three models with blocks of the same sizes follow one another


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
