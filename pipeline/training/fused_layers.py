"""Fused layers for LoRA training on a CPU: less time and memory than the layers of the libraries.

peft computes a layer and its adapter one after the other. Autograd keeps the inputs of both, in float32. Here

- a frozen layer and its adapter are one function, which keeps its input once even if several layers share it;
- everything is multiplied in the compute type, while weights stay stored in NF4 or bfloat16.

The results equal those of the libraries up to rounding. GPUs and sharded models use the layers of the libraries.
"""

from __future__ import annotations

from functools import reduce
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch

from pipeline.inference.kernels.attention import MODELS
from pipeline.inference.kernels.float32_mode import quicken_products
from pipeline.inference.kernels.products import float32_product, many_rows, row_blocks
from pipeline.training.packed_attention import use_packed_attention

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear as AdaptedLinear
    from transformers import PreTrainedModel

BLOCK_ELEMENTS = 1 << 22  # converted weights in memory at a time: 16 MB of float32


def fuse_layers(model: PeftModel, dtype: torch.dtype) -> None:
    """Make the layers and adapters of a model on a CPU compute in `dtype`, for any stored type of weights.

    For float32, other modules (norms, convolutions, stacked experts) are converted once.

    Args:
        model: the model, on a CPU.
        dtype: the compute type: bfloat16 or float32.
    """
    base = cast("PreTrainedModel", model.get_base_model())
    head, known = base.get_output_embeddings(), base.config.model_type in MODELS
    for layer in model.modules():
        if fuse_layer(layer, dtype):
            continue
        if known and all(hasattr(layer, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            layer.forward = MethodType(_feed_forward, layer)
        elif isinstance(layer, torch.nn.Embedding):
            layer.register_forward_hook(lambda _, __, states: states.to(dtype))
        elif dtype == torch.float32 and layer is not head:
            for parameter in layer.parameters(recurse=False):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
    if not known:  # some architectures multiply with weights outside their linear layers
        quicken_products(base)
    elif base.config._attn_implementation == "sdpa":
        use_packed_attention(base)


def fuse_layer(layer: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Make a frozen linear layer, or one with an adapter, compute in `dtype`; return False for any other layer."""
    if is_plain_adapter(layer):
        layer.forward = MethodType(_adapted, layer)  # type: ignore[method-assign]  # of this one layer
        return True
    if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
        layer.forward = MethodType(frozen_layer, layer)  # type: ignore[method-assign]  # of this one layer
        layer.compute_dtype = dtype  # type: ignore[assignment]  # torch declares attributes as tensors or modules
        return True
    return False


def is_plain_adapter(layer: torch.nn.Module) -> TypeGuard[AdaptedLinear]:
    """Return True if a layer is a frozen linear layer with one active LoRA adapter and nothing else.

    It may have another adapter that is not active, such as the reference of preference training.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or len(layer.active_adapters) != 1 or layer.lora_variant:
        return False
    factors = [layer.lora_A[name] for name in layer.lora_A] + [layer.lora_B[name] for name in layer.lora_B]
    plain = bool(factors) and all(type(factor) is torch.nn.Linear and factor.bias is None for factor in factors)
    return plain and isinstance(layer.get_base_layer(), torch.nn.Linear)


def frozen_layer(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Compute a frozen linear layer in `layer.compute_dtype`, with its weight in NF4 or in any floating type."""
    return _with_bias(_FrozenProduct.apply(x, layer), layer)


def _adapted(layer: AdaptedLinear, x: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
    """Compute a linear layer with a LoRA adapter: x W^T + b + scaling * dropout(x) A^T B^T.

    If the weight is quantized in training (`pipeline.training.qat`), W already contains the adapter.
    """
    if layer.disable_adapters or layer.merged or arguments or settings:
        return type(layer).forward(layer, x, *arguments, **settings)
    return _with_bias(_AdaptedProduct.apply(x, *_factors(layer), _AdaptedTerms(layer, x)), _base_layer(layer))


def _feed_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute the gated feed-forward part of a decoder block."""
    gate, up, layer = block.gate_proj(x), block.up_proj(x), block.down_proj
    if not is_plain_adapter(layer) or layer.disable_adapters or layer.merged:
        return layer(block.act_fn(gate) * up)
    y = _GatedProduct.apply(gate, up, *_factors(layer), _AdaptedTerms(layer, gate), block.act_fn)
    return _with_bias(y, _base_layer(layer))


def _base_layer(layer: AdaptedLinear) -> torch.nn.Linear:
    return cast(torch.nn.Linear, layer.get_base_layer())


def _factors(layer: AdaptedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name], layer.lora_B[name]
    return cast(torch.Tensor, a.weight), cast(torch.Tensor, b.weight)


def _with_bias(y: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _AdaptedTerms:
    """The constants of one call of a layer with an adapter: the frozen layer, the scale and the drawn dropout."""

    def __init__(self, layer: AdaptedLinear, x: torch.Tensor):
        name = layer.active_adapters[0]
        self.layer, self.scaling = _base_layer(layer), layer.scaling[name]
        self.is_merged = hasattr(self.layer, "shipped")
        self.share = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        self.kept = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - self.share) if self.share else None

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (..., N) for x (..., K), and x A^T (T, r) for the backward pass."""
        low = _product(_flat(self.dropped(x)), a.to(x.dtype))
        y = _times_transposed(x, self.layer)
        if not self.is_merged:
            _flat(y).addmm_(low, b.to(x.dtype).T, alpha=self.scaling)
        return y, low

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, low: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of x, A and B."""
        rows = _flat(gradient.to(x.dtype))
        narrow = _product(rows, b.to(x.dtype).T) * self.scaling
        of_x = _times(rows, self.layer).view(x.shape)
        if self.kept is not None:
            of_x += self.dropped((narrow @ a.to(x.dtype)).view(x.shape))
        elif not self.is_merged:
            _flat(of_x).addmm_(narrow, a.to(x.dtype))
        of_a = _product(narrow.T, _flat(self.dropped(x)).T)
        of_b = _product(low.T.contiguous(), rows.T).T * self.scaling
        return of_x, of_a.to(a.dtype), of_b.to(b.dtype)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.kept is None else x * self.kept * (1 / (1 - self.share))


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])


class _FrozenProduct(torch.autograd.Function):
    """The product of x (..., K) and the transposed weight (N, K) of a frozen layer; keeps nothing for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return _times_transposed(x, layer)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _times(gradient, ctx.layer), None


class _AdaptedProduct(torch.autograd.Function):
    """The frozen product plus scaling * (x A^T) B^T, with the trained A (r, K) and B (N, r) in float32."""

    @staticmethod
    def forward(ctx, x, a, b, terms):
        x = x.to(terms.layer.compute_dtype)
        y, low = terms.forward(x, a, b)
        ctx.save_for_backward(x, a, b, low)
        ctx.terms = terms
        return y

    @staticmethod
    def backward(ctx, gradient):
        return *ctx.terms.backward(gradient, *ctx.saved_tensors), None


class _GatedProduct(torch.autograd.Function):
    """The adapted product of activation(gate) * up, which the backward pass computes again instead of keeping it."""

    @staticmethod
    def forward(ctx, gate, up, a, b, terms, activation):
        y, low = terms.forward(activation(gate) * up, a, b)
        ctx.save_for_backward(gate, up, a, b, low)
        ctx.terms, ctx.activation = terms, activation
        return y

    @staticmethod
    def backward(ctx, gradient):
        gate, up, *adapter = ctx.saved_tensors
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        with torch.enable_grad():
            x = ctx.activation(gate) * up
        of_x, of_a, of_b = ctx.terms.backward(gradient, x.detach(), *adapter)
        return *torch.autograd.grad(x, (gate, up), of_x), of_a, of_b, None, None


def _weight(layer: torch.nn.Linear) -> torch.Tensor:
    """Return the weight (N, K) of a layer as training sees it: NF4 as bfloat16, other types as stored.

    A weight that is quantized in training is merged with its adapter and rounded as it will be shipped.
    """
    state, weight = getattr(layer.weight, "quant_state", None), layer.weight.detach()
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(layer.weight.data, state)
    shipped = getattr(layer, "shipped", None)
    return weight if shipped is None else shipped(weight)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (T, K) times the transposed weight (N, K) of the same type."""
    return float32_product(x, weight) if x.dtype == torch.float32 else x @ weight.T


def _times_transposed(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """Return x (..., K) times the transposed weight of a layer, (..., N), in its compute type."""
    flat = x.to(cast(torch.dtype, layer.compute_dtype)).reshape(-1, x.shape[-1])
    return times_transposed(flat, _weight(layer)).view(*x.shape[:-1], -1)


def times_transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (T, K) times a transposed weight (N, K) of any floating type, (T, N), in the type of `x`."""
    if x.dtype == torch.float32:
        return many_rows(x, weight, elements=BLOCK_ELEMENTS)
    return x @ weight.to(x.dtype).T


def _times(gradient: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """Return a gradient (..., N) times the weight of a layer, (..., K), in its compute type."""
    dtype, weight = cast(torch.dtype, layer.compute_dtype), _weight(layer)
    flat = gradient.to(dtype).reshape(-1, gradient.shape[-1])
    return sum_of_rows(flat, weight).view(*gradient.shape[:-1], -1)


def sum_of_rows(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return factors (T, N) times a weight (N, K) of any floating type, in the type of the factors."""
    if factors.dtype != torch.float32:
        return factors @ weight.to(factors.dtype)
    count, width = weight.shape
    blocks = row_blocks(count, width, BLOCK_ELEMENTS)
    return reduce(torch.Tensor.add_, (float32_product(factors[:, rows], weight[rows].float().T) for rows in blocks))
