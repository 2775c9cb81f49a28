"""A model built on the meta device and filled from its files by byte ranges.

The stock loader maps a file, and every page of it counts as memory; here a tensor is
read, packed for the machine, and forgotten before the next one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.errors import ModelError
from pipeline.inference import kernels
from pipeline.inference.kernels.table import Int8Embedding
from pipeline.models.checkpoint import Checkpoint, TensorInfo
from pipeline.models.safe_loading import open_config
from pipeline.quantization.formats import FileWeights, Format, rounds_inputs, stored_weights
from pipeline.quantization.grid import GroupQuantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Stored = Callable[[], GroupQuantized]
Weights = Checkpoint | FileWeights
Formats = dict[str, Format]  # a quantized weight's name -> the format that it is stored in


def assemble(folder: Path, device: torch.device, weights: FileWeights | None = None) -> PreTrainedModel | None:
    """The variant in a folder on `device`, its quantized layers packed for it.

    Args:
        weights: in the place of those in the folder.

    Returns:
        None where the stock loader is the better way: for a model that is not quantized, whose
        mapped pages are its weights, for one that rounds what its layers are given, which torchao
        computes, and for a checkpoint that names its tensors otherwise than
        the model does, as that of a mixture of experts may.

    Raises:
        CheckpointError: where the files are damaged, or a quantized weight's parts do not fit its layer.
        ModelError: where tensors are missing.
        OSError, ValueError: whatever transformers says of a configuration that it cannot use.
    """
    config = open_config(folder)
    if rounds_inputs(config):
        return None
    is_quantized = getattr(config, "quantization_config", None) is not None
    built = skeleton(folder, config, weights) if is_quantized or weights is not None else None
    if built is None and weights is not None:
        raise ModelError(f"{weights.path}: names its tensors otherwise than the model in {folder} does")
    if built is None:
        return None
    model, checkpoint, quantized = built
    if is_quantized:
        _attach_quantizer(model)
    names = list(model.state_dict())
    for name in (name for name in names if name in checkpoint):  # biases among them, which layers take along
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
    """The model of a folder on the meta device, its checkpoint, and the formats of what lies there quantized.

    Args:
        weights: in the place of those in the folder.

    Returns:
        None where the checkpoint names its tensors otherwise than the model does.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    checkpoint = Checkpoint(folder) if weights is None else weights
    quantized = stored_weights(checkpoint)
    parts = {part for name, form in quantized.items() for part in form.part_names(name)}
    plain = (info for name, info in checkpoint.items() if name not in parts)
    dtype = own_type(config, plain) if weights is None else weights.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if not _same_names(model, checkpoint, quantized, parts, folder if weights is None else weights.path):
        return None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, checkpoint, quantized


def own_type(config: PretrainedConfig, tensors: Iterable[TensorInfo]) -> torch.dtype:
    """What a model computes in: what its configuration says, or else what its first tensor is stored as."""
    found = (info.dtype for info in tensors if info.dtype.is_floating_point)
    return config.dtype or next(found, torch.bfloat16)


def tie_weights(model: PreTrainedModel, stored: Set[str]) -> None:
    """Tie what the configuration ties, but what is stored twice and differs, as transformers' own loader does."""
    model.tie_weights(missing_keys=set(model.state_dict()) - stored, recompute_mapping=False)


def refuse_gaps(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise where a tensor is still without data.

    Raises:
        ModelError: naming the first of them.
    """
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise ModelError(f"{folder}: its checkpoint has no {left[0]!r}; fetch the model again")


def place(
    model: PreTrainedModel, name: str, weight: GroupQuantized, device: torch.device, again: Stored, form: Format
) -> str:
    """Put the fastest layer there is for `weight` in the place of the layer `name`.

    Args:
        again: gives the weight once more, when a layer that keeps no codes is saved.
        form: the format that it came in, and is saved in.

    Returns:
        Of what kind the layer is, or the stored tensor where that is the fastest.
    """
    layer, dtype = model.get_submodule(name), model.dtype
    if isinstance(layer, torch.nn.Embedding):
        return _place_table(model, name, weight, device, form)
    bias = None if layer.bias is None else layer.bias.data.to(device)
    if kernels.runs_as_stored(weight, device):
        layer.weight = torch.nn.Parameter(form.tensor(weight, dtype).to(device), requires_grad=False)
        layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        return type(layer.weight.data).__name__
    new = kernels.linear(weight, bias, device)
    if new is None:
        rows, width = weight.codes.shape
        new = torch.nn.Linear(width, rows, bias is not None, device="meta")
        new.weight = torch.nn.Parameter(weight.dequantize(dtype), requires_grad=False)
        new.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    _save_as(new, new.portable if hasattr(new, "portable") else again, dtype, form)
    model.set_submodule(name, new.to(device))
    return type(new).__name__


def _place_table(model: PreTrainedModel, name: str, weight: GroupQuantized, device: torch.device, form: Format) -> str:
    """Put an int8 embedding in its place, and where it is tied the output head, on the same codes."""
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
    """Let a packed layer's weight stand in state dicts as it is stored in files."""
    layer.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({f"{prefix}weight": form.tensor(stored(), dtype)})
    )


def _leave_out_weight(module: torch.nn.Module, state: dict, prefix: str, _: dict) -> None:
    """Of a head that is tied nothing is stored but the embedding."""
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
    for name in wanted & checkpoint.keys():
        if checkpoint[name].shape != shapes[name]:
            found = checkpoint[name].shape
            raise ModelError(f"{source}: {name!r} is of {found} in its checkpoint, and of {shapes[name]} in the model")
    known = (torch.nn.Linear, torch.nn.Embedding)
    return not missing and not stray and all(isinstance(_owner(model, n), known) for n in quantized.keys() & wanted)


def _attach_quantizer(model: PreTrainedModel) -> None:
    """What the stock loader leaves on a quantized model, so that `save_pretrained` knows how to write it."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _put_layer(model: PreTrainedModel, name: str, checkpoint: Weights, device: torch.device, form: Format) -> None:
    module, shape = name.rpartition(".")[0], tuple(_owner(model, name).weight.shape)
    again = functools.partial(form.read, checkpoint, name, shape)
    place(model, module, again(), device, again, form)


def _owner(model: PreTrainedModel, name: str) -> torch.nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def put(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def read(model: PreTrainedModel, name: str, checkpoint: Weights) -> torch.Tensor:
    """The tensor as the model computes with it."""
    return checkpoint.read(name).to(computing_type(model, name, checkpoint[name].dtype))


def computing_type(model: PreTrainedModel, name: str, stored: torch.dtype) -> torch.dtype:
    """What a tensor becomes when it is loaded: the model's type unless the model wants it in float32."""
    if not stored.is_floating_point:
        return stored
    exact = list(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        exact += model._keep_in_fp32_modules or ()
    return torch.float32 if any(re.search(rf"(^|\.){key}(\.|$)", name) for key in exact) else model.dtype


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, the way transformers does."""
    for module in model.modules():
        empty = [leaf for leaf, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for leaf in empty:
            module._buffers[leaf] = torch.empty_like(module._buffers[leaf], device=device)
        module._is_hf_initialized = not empty
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # or it would be drawn anew
    model.initialize_weights()
