"""The output head of a model, which maps its last hidden states to logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import ModelError
from pipeline.inference.kernels.products import float32_product
from pipeline.models.safe_loading import open_config
from pipeline.models.tensor_names import open_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from pipeline.quantization.grid import GroupQuantized

LOGIT_ELEMENTS = 1 << 24  # logits held at a time
HEAD_ELEMENTS = 1 << 25  # of the output matrix in float32 at a time
HEAD_TOLERANCE = 0.02  # relative; a model computes its logits in its own type


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


@dataclass(frozen=True)
class HeadNames:
    """The names under which a full-precision checkpoint stores the output matrix and its bias, if it has one."""

    weight: str
    bias: str | None = None

    def read(self, folder: Path, weight: GroupQuantized | None = None) -> Head:
        """Return the output head of the full-precision model in a folder, on the CPU.

        Args:
            weight: the output matrix, if it is a rounded one.
        """
        checkpoint = open_checkpoint(folder)
        bias = checkpoint.read(self.bias) if self.bias else None
        matrix = checkpoint.read(self.weight) if weight is None else weight
        return Head(matrix, bias, *logit_settings(open_config(folder)))


def head_names(model: PreTrainedModel) -> HeadNames:
    """Return the names of the output head in the checkpoint of a full-precision model."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # under an adapter
        inner = inner.get_base_model()
    head = inner.get_output_embeddings()
    name = next(name for name, module in inner.named_modules() if module is head)
    # A tied head is stored under the embedding's name.
    weight = inner.all_tied_weights_keys.get(f"{name}.weight", f"{name}.weight")
    return HeadNames(weight, f"{name}.bias" if getattr(head, "bias", None) is not None else None)


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model computes; the weights of an offloaded one are elsewhere."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return torch.device(hook.execution_device) if hook else model.device


class Head:
    """The function from hidden states to logits, in float32 so that small differences survive.

    It is `softcap(scale * (states W^T + bias))`. A large matrix is converted to float32 in pieces at every use, to
    save memory.

    Args:
        weight: the output matrix (V, H).
        bias: (V,), or None.
        scale: the number that the products are multiplied by.
        softcap: the bound on the logits, or None.
    """

    def __init__(
        self,
        weight: torch.Tensor | GroupQuantized,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ):
        self.rows, self.width = weight.shape
        self._at_a_time = max(1, HEAD_ELEMENTS // self.width)
        self._weight = _exactly(weight, 0, self.rows) if self.rows <= self._at_a_time else weight
        self._bias = None if bias is None else bias.float()
        self.scale, self.softcap = scale, softcap

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) float32 of hidden states (..., H)."""
        states, parts = states.float(), []
        for first in range(0, self.rows, self._at_a_time):
            stop = min(first + self._at_a_time, self.rows)
            parts.append(float32_product(states, _exactly(self._weight, first, stop)))
        logits = torch.cat(parts, -1)
        if self._bias is not None:
            logits += self._bias
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def gradient(self, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient (T, H) float32 for the hidden states, given that for their logits (T, V)."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        found = gradient.new_zeros(len(gradient), self.width)
        for first in range(0, self.rows, self._at_a_time):
            stop = min(first + self._at_a_time, self.rows)
            found.addmm_(gradient[:, first:stop], _exactly(self._weight, first, stop), alpha=self.scale)
        return found

    def to(self, device: str | torch.device) -> Head:
        """Return this head on a device."""
        bias = None if self._bias is None else self._bias.to(device)
        return Head(self._weight.to(device), bias, self.scale, self.softcap)


def _exactly(weight: torch.Tensor | GroupQuantized, first: int, stop: int) -> torch.Tensor:
    """Return rows of a matrix in float32."""
    return weight[first:stop].float() if isinstance(weight, torch.Tensor) else weight.rows(first, stop).dequantize()


def head_of(model: PreTrainedModel) -> Head:
    """Return the output head of a model, on its device; `check_head` tells if the model computes just that."""
    from accelerate.utils import align_module_device

    layer: Any = model.get_output_embeddings()
    with align_module_device(layer):
        bias = getattr(layer, "bias", None)
        bias = None if bias is None else bias.detach().clone()
    return Head(head_matrix(model), bias, *logit_settings(model.config))


# Settings that multiply or divide the products of the output matrix, by the names that architectures have for them.
_MULTIPLIERS: tuple[str, ...] = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS: tuple[str, ...] = ("logits_scaling", "logits_mup_width_multiplier")
_BOUNDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_settings(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return the scale of a model's logits, and the bound that it puts on them, if it does."""
    text = config.get_text_config()
    multipliers, divisors = _MULTIPLIERS, _DIVISORS
    if text.model_type == "hyperclovax":  # the only architecture that multiplies by `logits_scaling`
        multipliers, divisors = (*_MULTIPLIERS, *_DIVISORS), ()
    scale = math.prod(_numbers(text, multipliers)) / math.prod(_numbers(text, divisors))
    return scale, next(iter(_numbers(text, _BOUNDS)), None)


def _numbers(config: PretrainedConfig, names: Iterable[str]) -> list[float]:
    found = (getattr(config, name, None) for name in names)
    return [float(value) for value in found if type(value) in (int, float) and value]


@torch.no_grad()
def check_head(model: PreTrainedModel, backbone: torch.nn.Module, head: Head, tokens: Sequence[int]) -> None:
    """Raise unless `head` gives the logits that the model itself computes for a few tokens.

    Raises:
        ModelError: if they differ, or the logits are not finite.
    """
    ids, kind = torch.tensor([tokens], device=device_of(model)), model.config.model_type
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    if not theirs.isfinite().all():
        raise ModelError(f"{kind}: its logits are not finite; the model is broken. Try: another model")
    states = backbone(input_ids=ids, use_cache=False)[0]
    fits = states.shape[:-1] == theirs.shape[:-1] and theirs.shape[-1] == head.rows and states.shape[-1] == head.width
    if not fits or not (head(states) - theirs).norm() <= HEAD_TOLERANCE * theirs.norm():  # NaN is neither
        raise ModelError(
            f"{kind}: its logits are more than its last hidden states times a matrix, with a bias, a scale and a "
            "bound; tunepress cannot train or measure such a model. Try: another architecture"
        )


def logits_of(head: Head, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, logits) in pieces that fit; states (T, H) -> logits (rows, V) float32."""
    step = max(1, LOGIT_ELEMENTS // head.rows)
    for start in range(0, len(states), step):
        rows = slice(start, min(start + step, len(states)))
        yield rows, head(states[rows])
