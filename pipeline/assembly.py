"""A model built on the meta device and filled from its files by byte ranges.

The stock loader maps a file, and every page of it counts as memory; here a tensor is
read, packed for the machine, and forgotten before the next one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline import kernels
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ModelError
from pipeline.kernels.cpu import Head
from pipeline.quantization.formats import torchao
from pipeline.quantization.grid import GroupQuantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def assemble(folder: Path, device: torch.device) -> PreTrainedModel | None:
    """The variant in a folder on `device`, its quantized layers packed for it.

    Returns:
        None where the stock loader is the better way: for a model that is not quantized, whose
        mapped pages are its weights, and for a checkpoint that names its tensors otherwise than
        the model does, as that of a mixture of experts may.

    Raises:
        CheckpointError: where the files are damaged, or a quantized weight's parts do not fit its layer.
        ModelError: where tensors are missing.
        OSError, ValueError: whatever transformers says of a configuration that it cannot use.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None:
        return None
    checkpoint = Checkpoint(folder)
    dtype = config.dtype or next(info.dtype for info in checkpoint.values() if info.dtype.is_floating_point)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantized = torchao.stored_weights(checkpoint)
    if not _same_names(model, checkpoint, quantized, folder):
        return None
    _attach_quantizer(model)
    for name in list(model.state_dict()):
        if name in quantized:
            _put_layer(model, name, checkpoint, device)
        elif name in checkpoint:
            _put(model, name, _read(model, name, checkpoint).to(device))
    model.tie_weights()
    _fill_buffers(model, device)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise ModelError(f"{folder}: its checkpoint has no {left[0]!r}; fetch the model again")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def replace(model: PreTrainedModel, name: str, weight: GroupQuantized, bias: torch.Tensor | None, device) -> str:
    """Put the fastest layer there is for `weight` in the place of the linear layer `name`; say of what kind it is."""
    layer = kernels.linear(weight, bias, device)
    if layer is None:
        rows, width = weight.codes.shape
        layer = torch.nn.Linear(width, rows, bias is not None, device="meta")
        layer.weight = torch.nn.Parameter(weight.dequantize(model.dtype), requires_grad=False)
        layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    elif hasattr(layer, "portable"):
        dtype = model.dtype
        layer.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({f"{prefix}weight": torchao.tensor(module.portable(), dtype)})
        )
    model.set_submodule(name, layer.to(device))
    return type(layer).__name__


def quicken_head(model: PreTrainedModel) -> None:
    """On a CPU, let the output head take the faster way for single tokens."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.weight.device.type == "cpu":
        name = next(name for name, module in model.named_modules() if module is head)
        model.set_submodule(name, Head(head))


def _same_names(model: PreTrainedModel, checkpoint: Checkpoint, quantized: set[str], folder: Path) -> bool:
    parts = {part for name in quantized for part in torchao.part_names(name)}
    there, wanted = (checkpoint.keys() - parts) | quantized, set(model.state_dict())
    tied = set(model.all_tied_weights_keys)
    missing = wanted - there - tied
    if missing and not there - wanted:
        raise ModelError(f"{folder}: its checkpoint has no {sorted(missing)[0]!r}; fetch the model again")
    stray = {name for name in there - wanted if not name.endswith("rotary_emb.inv_freq")}  # of old checkpoints
    linear = all(isinstance(model.get_submodule(n.rpartition(".")[0]), torch.nn.Linear) for n in quantized & wanted)
    return not missing and not stray and linear


def _attach_quantizer(model: PreTrainedModel) -> None:
    """What the stock loader leaves on a quantized model, so that `save_pretrained` knows how to write it."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _put_layer(model: PreTrainedModel, name: str, checkpoint: Checkpoint, device: torch.device) -> None:
    module = name.rpartition(".")[0]
    layer = model.get_submodule(module)
    weight = torchao.read(checkpoint, name, tuple(layer.weight.shape))
    bias = f"{module}.bias"
    bias = _read(model, bias, checkpoint) if bias in checkpoint else None
    if kernels.runs_as_stored(weight, device):
        stored = torchao.tensor(weight, model.dtype).to(device)
        layer.weight = torch.nn.Parameter(stored, requires_grad=False)
        return
    replace(model, module, weight, bias, device)


def _put(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _read(model: PreTrainedModel, name: str, checkpoint: Checkpoint) -> torch.Tensor:
    """The tensor, in the model's type unless the model wants it in float32."""
    tensor = checkpoint.read(name)
    if not tensor.is_floating_point():
        return tensor
    exact = list(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        exact += model._keep_in_fp32_modules or ()
    if any(re.search(rf"(^|\.){key}(\.|$)", name) for key in exact):
        return tensor.float()
    return tensor.to(model.dtype)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, the way transformers does."""
    for module in model.modules():
        empty = [leaf for leaf, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for leaf in empty:
            module._buffers[leaf] = torch.empty_like(module._buffers[leaf], device=device)
        module._is_hf_initialized = not empty
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # or it would be drawn anew
    model.initialize_weights()
