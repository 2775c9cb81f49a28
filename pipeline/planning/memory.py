"""What stages hold in memory: weights, optimizer, activations, caches. Bytes, by part.

The counts follow what the libraries keep for the backward pass (seen with torch's saved-tensor hooks), and the
constants what processes were measured to hold; `scripts/benchmark_plan.py` holds both against real stages.
What is said of CUDA is from the same formulas, and has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import Config, Lora, MeasuredRun, Train, VariantSpec
from pipeline.config.training_catalog import METHODS, NF4_BASE
from pipeline.models.layer_layouts import layout
from pipeline.planning.model import Sizes
from pipeline.system.hardware import compute_bytes_here, cores

Need = dict[str, int]  # part -> bytes

MB = 1_000_000
# Of processes that have imported what a stage uses and done nothing yet, on a CPU build of torch.
LIBRARIES = {"train": 580 * MB, "merge": 390 * MB, "compare": 510 * MB, "evaluate": 390 * MB, "quantize": 240 * MB}
SKELETON = 130 * MB  # of transformers, if it has to build the model to find its linear layers
CUDA_LIBRARIES = 2500 * MB  # main memory that a CUDA build of torch takes on top
CUDA_CONTEXT = 700 * MB  # GPU memory that is gone before the first tensor
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # a code, a scale of 8 bits for 64, a scale of those for 256 of them
# Stages keep the memory that they free (`process_environment.ALLOCATOR`). Blocks of other sizes leave holes in it,
# and the intermediate results of a layer lie there too.
HOLES = 1.5
MEASURING_HOLES = 1.1  # of scoring and comparing one model after another
COMPARED_HOLES = 1.3  # of three models one after the other, which all work in blocks of the same sizes
CUDA_HOLES = 1.15  # torch's own allocator fills its blocks better
MAPPED = "pages of the files"  # count as resident, and are given back where memory is short
LOSS_TOKENS, LOSS_COLUMNS = 4096, 32768  # of the tile of logits that trl computes at a time on a GPU
TRAINED_LOGITS = 1 << 23  # `training.fused_loss.LOGIT_ELEMENTS`
TRAINED_LOGIT_BYTES = 14  # each of them: float32 three times over, or twice and the tile in bf16
SCORED_TOKENS = 2048  # `measure.BATCH_TOKENS`
LOGITS = 1 << 24  # `heads.LOGIT_ELEMENTS`
LOGITS_BYTES = 30  # each of them: float32, seven and a half times over, while two models are compared
HEAD = 1 << 25  # `heads.HEAD_ELEMENTS`
LLAMA_CPP = 100 * MB  # of a process that has no torch; the stage has closed the file by then
PROBE = 70 * MB  # what a probe computes with
BLOCK = 4 * MB  # `blocks.BLOCK_BYTES`


def total(need: Need) -> int:
    return sum(need.values())


def wanted(need: Need) -> int:
    """What has to be free for it: all but what the system can take back."""
    return total(need) - need.get(MAPPED, 0)


def adapter_parameters(sizes: Sizes, lora: Lora) -> int:
    """Parameters of a LoRA adapter: a factor of rank columns and one of rank rows for each layer."""
    return sum(lora.rank * (rows + width) for rows, width in sizes.trained(lora).values())


def held_weights(sizes: Sizes, in_nf4: bool, other_bytes: int = 2) -> int:
    """The base as training holds it: linear layers in NF4 or bf16, embeddings in bf16.

    Args:
        other_bytes: of a number of everything else, which a CPU holds in its compute type.
    """
    tables = sum(rows * width for rows, width in sizes.tables.values())
    others = sizes.parameters - sizes.linear_parameters - tables
    return int(sizes.linear_parameters * (NF4_BYTES if in_nf4 else 2)) + 2 * tables + other_bytes * others


def training(sizes: Sizes, train: Train, on_gpu: bool) -> tuple[Need, Need]:
    """Main memory and GPU memory of the training stage. On a GPU gradients are checkpointed, on a CPU not."""
    in_nf4 = METHODS[train.method].in_nf4
    tokens, adapter = train.batch_size * train.max_length, adapter_parameters(sizes, train.lora)
    small_states = on_gpu and train.optimizer != "adamw" or train.optimizer == "paged_adamw_8bit"
    held = {
        "weights": held_weights(sizes, in_nf4, 2 if on_gpu else compute_bytes_here()),
        "adapter and optimizer": adapter * (4 + 4 + (2 if small_states else 8)),
    }
    if not on_gpu:
        layer = tokens * _kept_on_cpu(sizes, train, compute_bytes_here())
        held["activations"] = int(HOLES * sizes.layers * layer)
        held["mask"] = tokens**2 if train.packing else 0  # of booleans, for all packed sequences together
        held["logits"] = min(tokens * sizes.vocabulary, TRAINED_LOGITS) * TRAINED_LOGIT_BYTES
        return {"libraries": LIBRARIES["train"], **held}, {}
    layer = tokens * _kept_on_gpu(sizes, train)
    # Packed sequences lie in one row, so that every token has a place in the mask for every other.
    mask = 2 * (tokens**2 if train.packing else tokens * train.max_length)
    held["activations"] = int(CUDA_HOLES * (2 * sizes.hidden * tokens * sizes.layers + 2 * layer + 3 * mask))
    held["logits"] = 2 * min(tokens, LOSS_TOKENS) * min(sizes.vocabulary, LOSS_COLUMNS) + 8 * sizes.hidden * tokens
    held["dequantized weights"] = 2 * 2 * sizes.widest if in_nf4 else 0
    host = {"libraries": LIBRARIES["train"] + CUDA_LIBRARIES, MAPPED: sizes.shard_bytes}
    return host, {"CUDA itself": CUDA_CONTEXT, **held}


def _kept_on_cpu(sizes: Sizes, train: Train, width: int) -> int:
    """Bytes that one layer keeps of one token for the backward pass, with the functions of `kernels.training`.

    Two norms keep what they are given in float32, and in the compute type what they give; attention its queries, keys,
    values and result, the result once more as the next layer takes it, and a mask; the feed-forward part its two
    halves. An adapter that drops out keeps a boolean for each number of its input.

    Args:
        width: bytes of a number in the compute type.
    """
    attention = 3 * sizes.attention + 2 * sizes.keys
    mask = train.max_length // 2 if train.packing else train.max_length
    plain = 8 * sizes.hidden + width * (2 * sizes.hidden + attention + mask + 2 * sizes.intermediate)
    adapted = sizes.trained(train.lora).values()
    inputs = sum(width for _, width in adapted) // sizes.layers
    return plain + len(adapted) // sizes.layers * train.lora.rank * width + (inputs if train.lora.dropout else 0)


def _kept_on_gpu(sizes: Sizes, train: Train) -> int:
    """The same with the layers of the libraries.

    Two norms keep float32; attention its queries, keys, values (repeated for all heads) and result; the
    feed-forward part its gate, the activated gate, and the other half; an adapter its input in bf16, and
    where it drops out, the mask of that, as wide as the type that it is computed in.
    """
    plain = 8 * sizes.hidden + 8 * sizes.attention + 6 * sizes.intermediate
    inputs = sum(width for _, width in sizes.trained(train.lora).values()) // sizes.layers
    dropped = METHODS[train.method].dropout_bytes if train.lora.dropout else 0
    return plain + inputs * (2 + dropped)


def merging(sizes: Sizes, config: Config, kinds: tuple[str, ...], variants: int, on_gpu: bool) -> tuple[Need, Need]:
    """The pass over the files, and the comparison of two bases where there is one."""
    need = passing(sizes, LIBRARIES["merge"], variants)
    if NF4_BASE in kinds:
        need["weights in NF4"] = int(cores() * sizes.widest * 0.7)
    if len(kinds) == 1 or not isinstance(config, MeasuredRun):
        return need, {}
    live = held_weights(sizes, in_nf4=True) + 4 * adapter_parameters(sizes, config.train.lora)
    weights = max(live, sizes.bf16_bytes) if on_gpu else live
    host, gpu = measuring(sizes, weights, on_gpu, config.evaluate.max_tokens, COMPARED_HOLES)
    host["libraries"] += LIBRARIES["compare"] - LIBRARIES["evaluate"]
    # On a CPU the live adapter's base comes first, then either merge through a mapping of its files.
    return max(need, host if on_gpu else host | {MAPPED: sizes.bf16_bytes}, key=total), gpu


def passing(sizes: Sizes, libraries: int, variants: int) -> Need:
    """One pass over the files: a block in each thread, and what is made of it on its way, whatever the model's size."""
    return {"libraries": libraries, "blocks": cores() * BLOCK * (8 + variants)}


def quantizing(sizes: Sizes, specs: Sequence[VariantSpec]) -> Need:
    """The pass, and llama.cpp's quantizer in a process of its own, which takes a tensor at a time, in float32."""
    skeleton = 0 if layout(sizes.config) else SKELETON
    need = passing(sizes, LIBRARIES["quantize"] + skeleton, len(specs))
    if any(spec.variant.quantizer for spec in specs):
        need["llama.cpp's quantizer"] = PROBE + 8 * max(tensor.numel for tensor in sizes.tensors.values())
    return need


def measuring(
    sizes: Sizes, weights: int, on_gpu: bool, max_tokens: int, holes: float = MEASURING_HOLES
) -> tuple[Need, Need]:
    """Scoring texts with a model that holds so many bytes of weights, and comparing it with another one.

    The other's hidden states and output head are in memory then, the other itself is not.
    """
    layer = SCORED_TOKENS * (10 * sizes.hidden + 8 * sizes.attention + 6 * sizes.intermediate)
    table = sizes.vocabulary * sizes.hidden
    work = {
        "logits": LOGITS_BYTES * LOGITS,
        "output heads": 4 * min(HEAD, table) + 2 * table,
        "hidden states": 2 * 2 * 2 * sizes.hidden * max_tokens,
    }
    if on_gpu:  # where texts are scored; models are compared in main memory
        gpu = {"weights": weights, "activations": layer, "logits": 16 * LOGITS, "output head": 4 * min(HEAD, table)}
        return {"libraries": LIBRARIES["evaluate"] + CUDA_LIBRARIES, **work}, {"CUDA itself": CUDA_CONTEXT, **gpu}
    work = {part: int(holes * count) for part, count in {"activations": layer, **work}.items()}
    return {"libraries": LIBRARIES["evaluate"], "weights": weights, **work}, {}


def probed(host: Need, weights: int, on_gpu: bool) -> Need:
    """The same stage while a fresh process loads the model once more, to measure its speed.

    On a CPU the stage has the weights still: its output head lies in the same mapping.
    """
    fresh = LIBRARIES["evaluate"] + PROBE + (CUDA_LIBRARIES if on_gpu else weights)
    return host | {"a fresh process": fresh}


def in_llama_cpp(sizes: Sizes, stored: int, max_tokens: int) -> Need:
    """A GGUF measured through llama.cpp, on the CPU: the stage holds the file, and so does a fresh process after it."""
    return measuring(sizes, stored, False, max_tokens)[0] | {"a fresh process": LLAMA_CPP}


def offloaded(sizes: Sizes, max_tokens: int) -> Need:
    """Measuring a model from its files: the weights of the widest layer, and those of the output head."""
    widest = 2 * max(sizes.widest, sizes.vocabulary * sizes.hidden)
    return measuring(sizes, 2 * widest, False, max_tokens)[0]
