"""A LoRA training step on a CPU, in less time and memory than the libraries' own layers take.

peft computes a layer and its adapter one after the other, and autograd keeps the inputs of both, converted to the
adapter's float32. trl scores every position with the output head, and again for the gradient. Here

- a frozen layer and its adapter are one function. It keeps its input once, however many layers share it;
- only positions whose label counts go through the output head, once, and what is kept is their gradient;
- packed sequences attend to themselves only, instead of to all tokens of the step under a mask;
- everything is multiplied in the compute type. Weights stay stored as they are: NF4, or bfloat16.

The numbers are those of the libraries up to rounding. GPUs, and models divided among processes, keep the way of the
libraries.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.inference.kernels.attention import MODELS
from pipeline.inference.kernels.float32_mode import quicken_products
from pipeline.inference.kernels.products import float32_product, row_blocks

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

BLOCK_ELEMENTS = 1 << 22  # weights in the compute type at a time: 16 MB of float32
LOGIT_ELEMENTS = 1 << 23  # logits at a time: 32 MB of float32
PACKED_ATTENTION = "packed_on_cpu"  # by which transformers knows it


def quicken_training(model: PeftModel, dtype: torch.dtype) -> None:
    """Make a model with LoRA adapters on a CPU train in `dtype`, with the functions of this module.

    Call it after trl's trainer has prepared the model, whose loss it replaces.

    Args:
        dtype: bfloat16 or float32, the compute type.
    """
    quicken_layers(model, dtype)
    _quicken_loss(model.get_base_model(), dtype)


def quicken_layers(model: PeftModel, dtype: torch.dtype) -> None:
    """Make the layers and adapters of a model on a CPU compute in `dtype`, whatever their weights are stored in.

    In float32, what is neither a linear layer nor an embedding (norms, convolutions, stacked experts) is converted
    once.
    """
    base = model.get_base_model()
    head, known = base.get_output_embeddings(), base.config.model_type in MODELS
    for layer in model.modules():
        if _is_plain_adapter(layer):
            layer.forward = MethodType(_adapted, layer)
        elif known and all(hasattr(layer, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            layer.forward = MethodType(_feed_forward, layer)
        elif isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad:
            layer.forward = MethodType(_frozen, layer)
            layer.compute_dtype = dtype
        elif isinstance(layer, torch.nn.Embedding):
            layer.register_forward_hook(lambda _, __, states: states.to(dtype))
        elif dtype == torch.float32 and layer is not head:
            for parameter in layer.parameters(recurse=False):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
    if not known:  # some multiply with the weights of their layers themselves
        quicken_products(base)
    elif base.config._attn_implementation == "sdpa":
        _quicken_packed_attention(base)


def _is_plain_adapter(layer: torch.nn.Module) -> bool:
    """Return True if a layer is a frozen linear layer with one LoRA adapter and nothing else."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or len(layer.lora_A) != 1 or layer.lora_variant:
        return False
    (name,) = layer.lora_A
    factors = layer.lora_A[name], layer.lora_B[name]
    plain = all(type(factor) is torch.nn.Linear and factor.bias is None for factor in factors)
    return plain and isinstance(layer.get_base_layer(), torch.nn.Linear)


def _frozen(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Compute what a frozen linear layer computes, with its weight in NF4 or in any floating type."""
    return _with_bias(_FrozenProduct.apply(x, layer), layer)


def _adapted(layer: LoraLayer, x: torch.Tensor, *arguments, **settings) -> torch.Tensor:
    """Compute what a linear layer with a LoRA adapter computes: x W^T + b + scaling * dropout(x) A^T B^T."""
    if layer.disable_adapters or layer.merged or arguments or settings:
        return type(layer).forward(layer, x, *arguments, **settings)
    return _with_bias(_AdaptedProduct.apply(x, *_factors(layer), _Terms(layer, x)), layer.get_base_layer())


def _feed_forward(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute what the gated feed-forward part of a decoder block computes."""
    gate, up, layer = block.gate_proj(x), block.up_proj(x), block.down_proj
    if not _is_plain_adapter(layer) or layer.disable_adapters or layer.merged:
        return layer(block.act_fn(gate) * up)
    y = _GatedProduct.apply(gate, up, *_factors(layer), _Terms(layer, gate), block.act_fn)
    return _with_bias(y, layer.get_base_layer())


def _factors(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _with_bias(y: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _Terms:
    """What a layer with an adapter computes besides its input: the frozen layer, and the dropout that was drawn."""

    def __init__(self, layer: LoraLayer, x: torch.Tensor):
        (name,) = layer.lora_A
        self.layer, self.scaling = layer.get_base_layer(), layer.scaling[name]
        self.share = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        self.kept = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - self.share) if self.share else None

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (..., N) for x (..., K), and x A^T (T, r), which the backward pass needs again."""
        low = _product(_flat(self.dropped(x)), a.to(x.dtype))
        y = _times_transposed(x, self.layer)
        _flat(y).addmm_(low, b.to(x.dtype).T, alpha=self.scaling)
        return y, low

    def backward(self, gradient, x, a, b, low) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of x, A and B."""
        rows = _flat(gradient.to(x.dtype))
        narrow = _product(rows, b.to(x.dtype).T) * self.scaling
        of_x = _times(rows, self.layer).view(x.shape)
        if self.kept is None:
            _flat(of_x).addmm_(narrow, a.to(x.dtype))
        else:
            of_x += self.dropped((narrow @ a.to(x.dtype)).view(x.shape))
        of_a = _product(narrow.T, _flat(self.dropped(x)).T)
        of_b = _product(low.T.contiguous(), rows.T).T * self.scaling
        return of_x, of_a.to(a.dtype), of_b.to(b.dtype)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.kept is None else x * self.kept * (1 / (1 - self.share))


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])


class _FrozenProduct(torch.autograd.Function):
    """x (..., K) times the transposed weight (N, K) of a frozen layer. Keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return _times_transposed(x, layer)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return _times(gradient, ctx.layer), None


class _AdaptedProduct(torch.autograd.Function):
    """The same plus scaling * (x A^T) B^T, with A (r, K) and B (N, r) in float32, which are trained."""

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
    """The same of activation(gate) * up, which is computed again for the backward pass instead of being kept."""

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
    """Return the weight (N, K) of a frozen layer as training sees it: NF4 as bfloat16, anything else as stored."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (T, K) times the transposed weight (N, K) of the same type."""
    return float32_product(x, weight) if x.dtype == torch.float32 else x @ weight.T


def _times_transposed(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """Return x (..., K) times the transposed weight of a layer, (..., N), in its compute type."""
    flat, weight = x.to(layer.compute_dtype).reshape(-1, x.shape[-1]), _weight(layer)
    if flat.dtype == torch.float32:
        parts = [float32_product(flat, weight[rows].float()) for rows in row_blocks(*weight.shape, BLOCK_ELEMENTS)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    else:
        y = flat @ weight.to(flat.dtype).T
    return y.view(*x.shape[:-1], -1)


def _times(gradient: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """Return a gradient (..., N) times the weight of a layer, (..., K), in its compute type."""
    flat, weight = gradient.to(layer.compute_dtype).reshape(-1, gradient.shape[-1]), _weight(layer)
    return _sum_of_rows(flat, weight).view(*gradient.shape[:-1], -1)


def _sum_of_rows(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return factors (T, N) times a weight (N, K) of any floating type, in the type of the factors."""
    if factors.dtype != torch.float32:
        return factors @ weight.to(factors.dtype)
    result = None
    for rows in row_blocks(*weight.shape, BLOCK_ELEMENTS):
        part = float32_product(factors[:, rows], weight[rows].float().T)
        result = part if result is None else result.add_(part)
    return result


def _quicken_loss(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace trl's fused output head, where the head is a matrix with at most a soft cap behind it."""
    from trl.trainer.utils import FusedCausalLMOutput

    from pipeline.inference.output_head import softcap

    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scales = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    scaled = any(getattr(config, name, None) not in (None, 1.0) for name in scales)
    plain = head is not None and head.bias is None and not head.weight.requires_grad
    if scaled or not plain or getattr(config, "output_router_logits", False):
        return
    trls_forward = model.forward

    def forward(self, *arguments, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **settings):
        if not fused_lm_head or settings.get("shift_labels") is not None:
            return trls_forward(*arguments, fused_lm_head=fused_lm_head, labels=labels, **settings)
        count = settings.pop("num_items_in_batch", None)
        settings["use_cache"] = False  # with a cache, transformers would not look for packed sequences
        states = self.base_model(*arguments, **settings)[0][:, :-1]
        mask = labels[:, 1:] != -100
        found = _TokenLogProbs.apply(states[mask], head.weight, labels[:, 1:][mask], softcap(config), dtype)
        log_probs, entropy, is_top1 = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found)
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count)
        return FusedCausalLMOutput(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    model.forward = MethodType(forward, model)


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities of tokens, the entropy there, and whether each token is the likeliest one.

    Shapes: states (T, H), head (V, H), targets (T) -> three of (T); logits are never held for all tokens. What is kept
    for the backward pass is the gradient of each log-probability, (T, H).
    """

    @staticmethod
    def forward(ctx, states, head, targets, softcap, dtype):
        log_probs, entropy = states.new_empty(2, len(states), dtype=torch.float32)
        first = torch.empty(len(states), dtype=torch.bool)
        gradient = torch.empty(states.shape, dtype=dtype) if ctx.needs_input_grad[0] else None
        step = max(1, LOGIT_ELEMENTS // len(head))
        for start in range(0, len(states), step):
            rows = slice(start, start + step)
            logits, chosen = _logits(states[rows].to(dtype), head), targets[rows, None]
            bounded = None
            if softcap is not None:
                bounded = logits.div_(softcap).tanh_()
                logits = bounded * softcap
            first[rows] = logits.argmax(-1) == chosen.squeeze(1)
            logits -= logits.amax(-1, keepdim=True)
            of_chosen = logits.gather(1, chosen).squeeze(1)
            probabilities = logits.exp()
            total = probabilities.sum(-1, keepdim=True)
            probabilities /= total
            scale = total.squeeze(1).log()
            log_probs[rows] = of_chosen - scale
            entropy[rows] = scale - torch.bmm(probabilities[:, None], logits[:, :, None]).view(-1)
            if gradient is None:
                continue
            slope = probabilities.neg_()
            slope.scatter_add_(1, chosen, slope.new_ones(chosen.shape))
            if bounded is not None:
                slope *= 1 - bounded.square_()
            gradient[rows] = _sum_of_rows(slope.to(dtype), head.detach())
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        ctx.mark_non_differentiable(entropy, first)
        return log_probs, entropy, first

    @staticmethod
    def backward(ctx, of_log_probs, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * of_log_probs[:, None]).to(ctx.dtype), None, None, None, None


def _logits(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return states (T, H) times the transposed head (V, H) in float32, (T, V), multiplied in the states' type."""
    if states.dtype != torch.float32:
        return (states @ head.detach().to(states.dtype).T).float()
    result = torch.empty(len(states), len(head))
    for rows in row_blocks(*head.shape, BLOCK_ELEMENTS):
        result[:, rows] = float32_product(states, head.detach()[rows].float())
    return result


def _quicken_packed_attention(model: PreTrainedModel) -> None:
    """Let each sequence that is packed with others into one row attend to itself alone."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, _attend_packed)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


def _attend_packed(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """Compute what transformers' sdpa attention computes for one row of packed sequences, sequence by sequence.

    Shapes: query (1, H, T, D), key and value (1, H', T, D), mask (1, 1, T, T) of booleans. `cu_seq_lens_q` tells where
    sequences begin. Anything else goes to transformers' own function.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = others.get("cu_seq_lens_q")
    asked = dropout or any(others.get(name) is not None for name in ("softcap", "position_bias"))
    packed = bounds is not None and len(query) == 1 and attention_mask is not None and key.shape[2] == bounds[-1]
    if not packed or asked or attention_mask.dtype != torch.bool:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    lengths = bounds.diff().tolist()
    sequences = zip(*(states.split(lengths, 2) for states in (query, key, value)), lengths, strict=True)
    parts, first = [], 0
    for q, k, v, length in sequences:
        rows = slice(first, first + length)
        shares = {"enable_gqa": query.shape[1] != key.shape[1]}
        mask = attention_mask[:, :, rows, rows]
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, **shares))
        first += length
    return torch.cat([part.transpose(1, 2) for part in parts], 1), None
