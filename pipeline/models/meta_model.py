"""Models on the meta device that are filled tensor by tensor."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    """Set the parameter or buffer `name` of a model."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def computing_type(model: PreTrainedModel, name: str, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of a loaded tensor: the model's own, or float32 if the model asks for that."""
    if not stored.is_floating_point:
        return stored
    exact = list(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        exact += model._keep_in_fp32_modules or ()
    return torch.float32 if any(re.search(rf"(^|\.){key}(\.|$)", name) for key in exact) else model.dtype


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, as transformers does.

    Most modules compute their own buffers. The others are left to the modules around them, as in Falcon-H1.

    Raises:
        ModelError: naming a buffer that transformers does not compute.
    """
    module: Any
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta and buffer.is_floating_point()]
    for module in model.modules():
        unset = [leaf for leaf, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for leaf, buffer in module._buffers.items():
            if leaf in unset:
                value = math.nan if buffer.is_floating_point() else 0
                module._buffers[leaf] = torch.full_like(buffer, value, device=device)
            elif buffer is not None:
                buffer._is_hf_initialized = True
        module._is_hf_initialized = not unset
        parameter: Any
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # or transformers would draw it at random
    model.initialize_weights()
    if any(model.get_buffer(name).isnan().all() for name in empty):
        for module in model.modules():
            module._is_hf_initialized = not any(buffer.isnan().all() for buffer in module.buffers())
        model.initialize_weights()
    for name in empty:
        if model.get_buffer(name).isnan().all():
            raise ModelError(f"{name}: neither stored nor computed by transformers. Try: another architecture")
