"""The architectures that are written, and the names, orders and offsets of their tensors in llama.cpp.

Names: gguf-py/gguf/tensor_mapping.py of llama.cpp, through the package `gguf`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch

from pipeline.errors import MissingExtra, ModelError, QuantizationError
from pipeline.models.experts import without_number
from pipeline.system.libraries import is_installed

_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # which old checkpoints store, and nobody reads
_INPUTS, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
BIASES = {"attention_bias": (*_INPUTS, "o_proj"), "mlp_bias": _MLP}  # of a configuration -> the layers that get one


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers as llama.cpp computes it.

    Attributes:
        name: its name in GGUF.
        pairs: rotary embeddings turn neighbouring channels, and not those half a head apart, so that the
            rows of queries and keys are stored in another order.
        norm_offset: what is added to the weights of norms, since the model multiplies by 1 + w.
        activation: of the MLP, the only one that llama.cpp computes for it.
        biases: the layers whose biases it loads; with any other it refuses the file.
        sums_to_one: for a mixture of experts, True if the shares of the chosen experts are scaled to a sum of one.
    """

    name: str
    pairs: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    biases: tuple[str, ...] = _INPUTS
    sums_to_one: bool | None = None


ARCHITECTURES = {  # by `model_type` in config.json
    "llama": Architecture("llama", pairs=True, biases=(*_INPUTS, "o_proj", *_MLP)),
    "smollm3": Architecture("smollm3", pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "mixtral": Architecture("llama", pairs=True, biases=(), sums_to_one=True),
    "qwen3_moe": Architecture("qwen3moe", sums_to_one=True),
    "olmoe": Architecture("olmoe", biases=(), sums_to_one=False),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh"),
}


def library() -> ModuleType:
    """Return the package `gguf`.

    Raises:
        MissingExtra: if it is not installed.
    """
    if not is_installed("gguf"):
        raise MissingExtra("GGUF", "gguf")
    import gguf

    return gguf


def architecture(model_type: str | None) -> Architecture:
    """Return the architecture of a `model_type` in config.json.

    Raises:
        ModelError: if it is not written as GGUF.
    """
    if model_type not in ARCHITECTURES:
        raise ModelError(f"{model_type}: not written as GGUF; handled are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def architecture_named(name: str) -> Architecture:
    """Return the architecture with that name in GGUF.

    Raises:
        ModelError: if no written architecture has it.
    """
    found = next((known for known in ARCHITECTURES.values() if known.name == name), None)
    if found is None:
        raise ModelError(f"{name}: no architecture that is written as GGUF here")
    return found


def stored_names(of: Architecture, layers: int, names: Iterable[str]) -> dict[str, str]:
    """Map the tensors of a checkpoint to their names in GGUF; tensors that are not stored are left out.

    The matrices of all experts of a block have one name, since they are stored in one stack.

    An output head in the checkpoint is stored, even if the configuration ties it to the embedding. If both differ,
    transformers computes with both, and so does llama.cpp.

    Raises:
        QuantizationError: if llama.cpp has no place for a tensor.
    """
    gguf = library()
    wanted = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == of.name)
    known, stored = gguf.get_tensor_name_map(wanted, layers), {}
    for name in names:
        if _COMPUTED.search(name):
            continue
        target = known.get_name(without_number(name), try_suffixes=(".weight", ".bias"))
        layer, _, leaf = name.rpartition(".")
        if target is None or (leaf == "bias" and layer.rpartition(".")[2] not in of.biases):
            raise QuantizationError(f"{name}: llama.cpp knows no such tensor of {of.name}")
        stored[name] = target
    return stored


def rows_together(of: Architecture, name: str, head_dim: int) -> int:
    """Return the number of rows of a tensor that are reordered together."""
    return head_dim if of.pairs and re.search(r"\.self_attn\.[qk]_proj\.", name) else 1


def as_stored(of: Architecture, name: str, rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return rows of whole heads in the order of llama.cpp, and norms with its offset in float32.

    With `pairs`, channel i of the first half of a head comes beside channel i of the second.
    """
    if rows_together(of, name, head_dim) > 1:
        halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)
    if of.norm_offset and name.endswith("norm.weight"):
        return rows.float() + of.norm_offset
    return rows


def as_in_checkpoint(of: Architecture, name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return a stored tensor as the checkpoint has it: the inverse of `as_stored`."""
    if rows_together(of, name, head_dim) > 1:
        pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)
    if of.norm_offset and name.endswith("norm.weight"):
        return tensor - of.norm_offset
    return tensor
