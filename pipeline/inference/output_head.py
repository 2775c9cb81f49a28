"""The output matrix of a model, which maps its last hidden states to logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import ModelError
from pipeline.inference.kernels.products import float32_product

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from pipeline.quantization.grid import GroupQuantized

LOGIT_ELEMENTS = 1 << 24  # logits held at a time
HEAD_ELEMENTS = 1 << 25  # of the output matrix in float32 at a time


def head_matrix(model: PreTrainedModel) -> torch.Tensor | GroupQuantized:
    """Return the output matrix (V, H) that the model computes with, on its device, also if it is offloaded."""
    from accelerate.utils import align_module_device

    from pipeline.quantization.formats import unpack

    layer: Any = model.get_output_embeddings()
    if hasattr(layer, "portable"):
        portable: GroupQuantized = layer.portable()
        return portable
    with align_module_device(layer):
        weight = layer.weight.detach()
    stored = unpack(weight)
    return weight if stored is None else stored[0]


def head_name(model: PreTrainedModel) -> str:
    """Return the name of the output matrix in the checkpoint of a full-precision model."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # under an adapter
        inner = inner.get_base_model()
    head = inner.get_output_embeddings()
    name = next(name for name, module in inner.named_modules() if module is head) + ".weight"
    # A tied head is stored under the embedding's name.
    return inner.all_tied_weights_keys.get(name, name)


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model computes; the weights of an offloaded one are elsewhere."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return torch.device(hook.execution_device) if hook else model.device


class Head:
    """The function from hidden states to logits, in float32 so that small differences survive.

    A large matrix is converted to float32 in pieces at every use, to save memory.
    """

    def __init__(self, weight: torch.Tensor | GroupQuantized, softcap: float | None):
        self.rows, width = weight.shape
        self._at_a_time = max(1, HEAD_ELEMENTS // width)
        self._weight = _exactly(weight, 0, self.rows) if self.rows <= self._at_a_time else weight
        self.softcap = softcap

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) float32 of hidden states (..., H)."""
        states, parts = states.float(), []
        for first in range(0, self.rows, self._at_a_time):
            stop = min(first + self._at_a_time, self.rows)
            parts.append(float32_product(states, _exactly(self._weight, first, stop)))
        logits = torch.cat(parts, -1)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _exactly(weight: torch.Tensor | GroupQuantized, first: int, stop: int) -> torch.Tensor:
    """Return rows of a matrix in float32."""
    return weight[first:stop].float() if isinstance(weight, torch.Tensor) else weight.rows(first, stop).dequantize()


def head_of(model: PreTrainedModel) -> Head:
    """Return the output head of a model.

    Raises:
        ModelError: if it is more than a matrix.
    """
    layer: Any = model.get_output_embeddings()
    if getattr(layer, "bias", None) is not None:  # comparing has the matrix alone
        raise ModelError(f"{model.config.model_type}: its output matrix has a bias; not handled yet")
    return Head(head_matrix(model), softcap(model.config))


def softcap(config: PretrainedConfig) -> float | None:
    """Return the bound that some models put on their logits."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def check_head(model: PreTrainedModel, backbone: torch.nn.Module, head: Head, tokens: Sequence[int]) -> None:
    """Raise unless `head` gives the logits that the model itself computes from its hidden states.

    Raises:
        ModelError: if they differ, or the logits are not finite.
    """
    ids = torch.tensor([tokens], device=device_of(model))
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    ours = head(backbone(input_ids=ids, use_cache=False)[0])
    if not theirs.isfinite().all():
        raise ModelError(f"{model.config.model_type}: its logits are not finite; the model is broken")
    if (ours - theirs).norm() > 0.02 * theirs.norm():
        kind = model.config.model_type
        raise ModelError(f"{kind}: its logits are more than hidden states times the output matrix; not handled yet")


def logits_of(head: Head, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, logits) in pieces that fit; states (T, H) -> logits (rows, V) float32."""
    step = max(1, LOGIT_ELEMENTS // head.rows)
    for start in range(0, len(states), step):
        rows = slice(start, min(start + step, len(states)))
        yield rows, head(states[rows])
