"""Models built on the meta device and filled from their files by byte ranges.

The stock loader maps a file, and every mapped page counts as memory. Here each tensor is
read, packed for the machine and released before the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import CheckpointError, ModelError
from pipeline.inference import kernels
from pipeline.inference.kernels.table import Int8Embedding
from pipeline.inference.stacked_experts import StackedExperts
from pipeline.models.checkpoint import Checkpoint, TensorInfo
from pipeline.models.experts import expert_places
from pipeline.models.meta_model import computing_type, fill_buffers, put
from pipeline.models.safe_loading import open_config, open_generation_config
from pipeline.models.tensor_names import open_checkpoint
from pipeline.quantization.formats import FileWeights, Format, rounds_inputs, stored_weights
from pipeline.quantization.grid import GroupQuantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Stored = Callable[[], GroupQuantized]
Weights = Checkpoint | FileWeights | StackedExperts
CODE_TYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn)  # of weights that mean nothing without scales
Formats = dict[str, Format]  # a quantized weight's name -> the format that it is stored in


def assemble(folder: Path, device: torch.device, weights: FileWeights | None = None) -> PreTrainedModel | None:
    """Return the variant in a folder on `device`, with its quantized layers packed for that device.

    Args:
        weights: replace those in the folder.

    Returns:
        None if the stock loader is better. That holds for a model that is not quantized, because its mapped pages
        are its weights. It holds for a model whose layers a library computes, such as one that rounds their inputs,
        and for stacks of experts that are stored as codes. It also holds for a checkpoint with other tensor names
        than the model.

    Raises:
        CheckpointError: if the files are damaged, or a quantized weight's parts do not fit its layer.
        ModelError: if tensors are missing.
        OSError, ValueError: if transformers cannot use the configuration.
    """
    config = open_config(folder)
    if rounds_inputs(config):
        return None
    is_quantized = getattr(config, "quantization_config", None) is not None
    built = skeleton(folder, config, weights) if is_quantized or weights is not None else None
    if built is None and weights is not None:
        raise ModelError(f"{weights.path}: its tensor names differ from those of the model in {folder}")
    if built is None:
        return None
    model, checkpoint, quantized = built
    if not all(form.assembles for form in quantized.values()):
        for name, form in quantized.items():
            form.check_stored(checkpoint, name, tuple(model.get_parameter(name).shape))
        return None
    if isinstance(checkpoint, StackedExperts) and checkpoint.are_stored:
        return None
    if is_quantized and not any(form.replaces_layers for form in quantized.values()):
        _attach_quantizer(model)
    names = list(model.state_dict())
    plain = [name for name in names if name in checkpoint and name not in quantized]
    for name in plain:  # biases among them, which layers take along
        put(model, name, read(model, name, checkpoint).to(device))
    for name in (name for name in names if name in quantized):
        _put_layer(model, name, checkpoint, device, quantized[name])
    if not model.config.get_text_config().tie_word_embeddings or _table(model) not in quantized:
        tie_weights(model, checkpoint.keys() | quantized.keys())
    fill_buffers(model, device)
    refuse_gaps(folder, [*model.named_parameters(), *model.named_buffers()])
    return model


def skeleton(
    folder: Path, config: PretrainedConfig, weights: FileWeights | None = None
) -> tuple[PreTrainedModel, Weights, Formats] | None:
    """Return the model of a folder on the meta device, its checkpoint, and the formats of its quantized weights.

    Args:
        weights: replace those in the folder.

    Returns:
        None if the checkpoint has other tensor names than the model.

    Raises:
        ModelError: if tensors are missing, or the model changes its weights.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config.get_text_config(), "rescale_every", 0):
        raise ModelError(
            f"{folder}: a {config.model_type} changes its weights while it runs, so they are not packed or read layer "
            "by layer. Try: the full-precision model, on a machine with more memory"
        )
    stored = open_checkpoint if getattr(config, "quantization_config", None) is None else Checkpoint
    checkpoint: Weights = stored(folder) if weights is None else weights
    quantized = stored_weights(checkpoint)
    parts = {part for name, form in quantized.items() for part in form.part_names(name)}
    if bare := [name for name, info in checkpoint.items() if name not in parts and info.dtype in CODE_TYPES]:
        raise CheckpointError(f"{folder}: {bare[0]} has codes without the scales that belong to them; fetch it again")
    plain = (info for name, info in checkpoint.items() if name not in parts)
    dtype = own_type(config, plain) if weights is None else weights.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if expert_places(model):
        checkpoint = StackedExperts(model, checkpoint, quantized)
        quantized = checkpoint.plain_formats
    if not _same_names(model, checkpoint, quantized, parts, folder if weights is None else weights.path):
        return None
    if (folder / "generation_config.json").is_file():
        model.generation_config = open_generation_config(folder)
    return model, checkpoint, quantized


def own_type(config: PretrainedConfig, tensors: Iterable[TensorInfo]) -> torch.dtype:
    """Return the dtype of the configuration, or else the dtype of the first stored tensor."""
    found = (info.dtype for info in tensors if info.dtype.is_floating_point)
    own: torch.dtype | None = config.dtype  # type: ignore[assignment]  # a string only before transformers reads it
    return own or next(found, torch.bfloat16)


def tie_weights(model: PreTrainedModel, stored: Set[str]) -> None:
    """Tie weights as transformers does: a weight that is stored twice and differs stays untied."""
    model.tie_weights(missing_keys=set(model.state_dict()) - stored, recompute_mapping=False)


def refuse_gaps(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise if a tensor still has no data.

    Raises:
        ModelError: with the name of the first one.
    """
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise ModelError(f"{folder}: its checkpoint has no {left[0]!r}; fetch the model again")


def place(
    model: PreTrainedModel, name: str, weight: GroupQuantized, device: torch.device, again: Stored, form: Format
) -> str:
    """Replace the layer `name` with the fastest layer for `weight`.

    Args:
        again: returns the weight again when a layer without codes is saved.
        form: the format in which it was read and is saved.

    Returns:
        The class name of the new layer, or of the stored tensor if that is the fastest.
    """
    layer: Any = model.get_submodule(name)
    dtype = model.dtype
    if isinstance(layer, torch.nn.Embedding):
        return _place_table(model, name, weight, device, form)
    bias = None if layer.bias is None else layer.bias.data.to(device)
    tensor = form.tensor(weight, dtype) if kernels.runs_as_stored(weight, device) else None
    if tensor is not None:
        layer.weight = torch.nn.Parameter(tensor.to(device), requires_grad=False)
        layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        return type(layer.weight.data).__name__
    new: Any = kernels.linear(weight, bias, device)
    if new is None:
        rows, width = weight.codes.shape
        new = torch.nn.Linear(width, rows, bias is not None, device="meta")
        new.weight = torch.nn.Parameter(weight.dequantize(dtype), requires_grad=False)
        new.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    _save_as(new, new.portable if hasattr(new, "portable") else again, dtype, form)
    model.set_submodule(name, new.to(device))
    return type(new).__name__


def _place_table(model: PreTrainedModel, name: str, weight: GroupQuantized, device: torch.device, form: Format) -> str:
    """Replace the embedding with an int8 one. A tied output head shares its codes."""
    head = model.get_output_embeddings()
    weight = weight.to(device)
    embedding = Int8Embedding(weight, model.dtype)
    _save_as(embedding, embedding.portable, model.dtype, form)
    model.set_submodule(name, embedding)
    if model.config.get_text_config().tie_word_embeddings:
        place(model, _name_of(model, head), weight, device, embedding.portable, form)
        model.get_output_embeddings().register_state_dict_post_hook(_leave_out_weight)
    return type(embedding).__name__


def _save_as(layer: torch.nn.Module, stored: Stored, dtype: torch.dtype, form: Format) -> None:
    """Make state dicts hold the weight of a packed layer as files store it.

    Its `weight` tells the type and the device to models that ask a layer for them, and has no elements.
    """
    if hasattr(layer, "portable"):
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def save(module: torch.nn.Module, state: dict, prefix: str, _: dict) -> None:
        state.pop(f"{prefix}weight", None)
        state.update(form.state(f"{prefix}weight", stored(), dtype))

    layer.register_state_dict_post_hook(save)


def _leave_out_weight(module: torch.nn.Module, state: dict, prefix: str, _: dict) -> None:
    """Leave a tied output head out of state dicts, because the embedding stores its weight."""
    del state[f"{prefix}weight"]


def _name_of(model: PreTrainedModel, wanted: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _table(model: PreTrainedModel) -> str:
    return f"{_name_of(model, model.get_input_embeddings())}.weight"


def _same_names(model: PreTrainedModel, checkpoint: Weights, quantized: Formats, parts: set[str], source: Path) -> bool:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there, wanted = (checkpoint.keys() - parts) | quantized.keys(), shapes.keys()
    tied = set(model.all_tied_weights_keys)
    missing = wanted - there - tied
    if missing and not there - wanted:
        raise ModelError(f"{source}: its checkpoint has no {sorted(missing)[0]!r}; fetch the model again")
    stray = {name for name in there - wanted if not name.endswith("rotary_emb.inv_freq")}  # of old checkpoints
    for name in (wanted & checkpoint.keys()) - quantized.keys():
        if checkpoint[name].shape != shapes[name]:
            found = checkpoint[name].shape
            raise ModelError(f"{source}: {name!r} is of {found} in its checkpoint, and of {shapes[name]} in the model")
    known = (torch.nn.Linear, torch.nn.Embedding)
    return not missing and not stray and all(isinstance(_owner(model, n), known) for n in quantized.keys() & wanted)


def _attach_quantizer(model: PreTrainedModel) -> None:
    """Attach the quantizer that `save_pretrained` needs to write a quantized model, as the stock loader does."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _put_layer(model: PreTrainedModel, name: str, checkpoint: Weights, device: torch.device, form: Format) -> None:
    module, shape = name.rpartition(".")[0], tuple(_owner(model, name).weight.shape)
    again = functools.partial(form.read, checkpoint, name, shape)
    place(model, module, again(), device, again, form)


def _owner(model: PreTrainedModel, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0])


def read(model: PreTrainedModel, name: str, checkpoint: Weights) -> torch.Tensor:
    """Return a stored tensor in the dtype that the model computes with."""
    return checkpoint.read(name).to(computing_type(model, name, checkpoint[name].dtype))
