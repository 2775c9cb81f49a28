"""One step of decoding on a CPU: a new token through all decoder blocks, by as few operations as there can be.

A token of a small model takes a few milliseconds, and transformers' own way through the blocks needs some fifty
operations, ten calls of modules and three copies of the cache in each of them. Here q, k and v are one product, and so
are gate and up; the cache grows in place; and of the modules only the weights are used. What cannot be done so (a
prompt, a window that slides, hooks, an adapter, outputs of every block) goes the ordinary way, through the same
weights: the layers of a joined product hold views of it.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from itertools import repeat
from operator import contains, getitem, is_
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.inference.kernels.cpu import PackedLinear
from pipeline.inference.kernels.joined import addresses, product, read_tensors
from pipeline.inference.kernels.pages import Room, give_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.inference.kernels.growing import GrowingLayer

# Their blocks are: norm, attention with rotary positions, norm, gated MLP. Tests compare each with transformers' own.
MODELS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_ROWS = 8  # sequences at a time up to which this was found to be faster
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def quicken_decoding(model: PreTrainedModel) -> None:
    """Let a model on a CPU that is of a known kind write single tokens by `Step`. What it stores stays as it is."""
    backbone: Any = model.base_model
    if model.config.model_type not in MODELS or model.device.type != "cpu" or not hasattr(backbone, "layers"):
        return
    backbone.forward = types.MethodType(_wrapped(type(backbone).forward), backbone)
    backbone._apply = types.MethodType(_apply, backbone)
    backbone.__dict__["_step"] = Step(backbone)


@functools.cache
def _wrapped(ordinary: Callable) -> Callable:
    @functools.wraps(ordinary)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.__dict__.get("_step")
        output = step(self, *args, **kwargs) if step is not None else None
        return ordinary(self, *args, **kwargs) if output is None else output

    return forward


def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the step again after the model was moved or cast, because its layers have other tensors then."""
    type(self)._apply(self, *args, **kwargs)
    step = self.__dict__.get("_step")
    if step is not None and not step.holds():
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.parameters())
        self.__dict__["_step"] = Step(self) if on_cpu else None
    return self


class Step:
    """The blocks of a model, made ready for single tokens."""

    def __init__(self, backbone: Any):
        self.dtype = backbone.norm.weight.dtype
        self.window = getattr(backbone.config, "sliding_window", None) or math.inf
        packed = [module for module in backbone.layers.modules() if isinstance(module, PackedLinear)]
        room = Room(Room.needed([tensor for layer in packed for tensor in read_tensors(layer)]))
        self.blocks = []
        for layer in backbone.layers:
            self.blocks.append(Block(layer, self.dtype, room))
            if packed:
                give_back()  # or all layers would be in memory twice
        self.norm = Norm(backbone.norm, self.dtype)
        self.embed, self.rotary = backbone.embed_tokens, backbone.rotary_emb
        used = [(backbone, name) for name in ("norm", "embed_tokens", "rotary_emb", "layers")]
        for number, layer in enumerate(backbone.layers):
            used.append((backbone.layers, str(number)))
            used += [(layer, name) for name, _ in layer.named_children()]
            for part in (layer.self_attn, layer.mlp):
                used += [(part, name) for name, _ in part.named_children()]
        self._holders = [holder._modules for holder, _ in used]
        self._names = [name for _, name in used]
        self._modules = [holder._modules[name] for holder, name in used]
        self._dicts = [module.__dict__ for module in self._modules]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.rows = min((module.kernel_tokens for module in packed), default=_ROWS)
        self._packed, self._places = packed, addresses(packed)

    def holds(self) -> bool:
        """Return True if the layers still have the tensors that this was made of."""
        return self.norm.weight.dtype == self.dtype and addresses(self._packed) == self._places

    def unchanged(self) -> bool:
        """Return True if the model's modules are those that this was made of, and nothing listens to their calls."""
        there = all(map(is_, map(getitem, self._holders, self._names), self._modules))
        everywhere = torch.nn.modules.module
        hooked = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or any(self._hooks)
        return there and not hooked and not any(map(contains, self._dicts, repeat("forward")))

    def __call__(
        self,
        backbone: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: object = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: object = None,
        **others: Any,
    ) -> Any:
        """Return what the model's own `forward` does; None if that has to do it."""
        cache = past_key_values if cache is None else cache
        given = input_ids if inputs_embeds is None else inputs_embeds
        if cache is None or given is None or (input_ids is not None) is (inputs_embeds is not None):
            return None
        if given.shape[1] != 1 or given.shape[0] > self.rows or torch.is_grad_enabled() or _asks(others, use_cache):
            return None
        if getattr(backbone.config, "output_hidden_states", False) or torch.is_autocast_enabled("cpu"):
            return None
        from pipeline.inference.kernels.growing import growing

        layers = growing(cache, len(self.blocks), given.shape[0]) if self.unchanged() else None
        if layers is None:
            return None
        length = layers[0].keys.shape[2]
        if (
            length >= self.window
        ):  # a cache made without the configuration keeps all tokens, and a mask hides the old ones
            return None
        mask = _mask(attention_mask, given.shape[0], length + 1)
        if mask is False:
            return None
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.dtype != self.dtype:
            return None
        if position_ids is None:
            position_ids = torch.full((1, 1), length)
        cos, sin = self.rotary(hidden, position_ids=position_ids)
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        hidden = hidden.squeeze(1)
        for layer in layers:
            layer.make_room(1)  # outside, because what is made there may not be written to elsewhere
        with torch.inference_mode():  # a fifth less time for each of the many views
            for block, layer in zip(self.blocks, layers, strict=True):
                hidden = block(hidden, cos, signed, layer, mask)
        return _output(self.norm(hidden).unsqueeze(1), cache)


@functools.cache
def _output_type() -> tuple[type, str]:
    from transformers.modeling_outputs import BaseModelOutputWithPast as Output

    return Output, "cache" if "cache" in Output.__dataclass_fields__ else "past_key_values"


def _output(hidden: torch.Tensor, cache: object) -> Any:
    kind, name = _output_type()
    return kind(last_hidden_state=hidden, **{name: cache})


def _asks(others: dict, use_cache: bool | None) -> bool:
    """Return True if a call asks for anything that a step does not give."""
    if use_cache is False:
        return True
    return any(value is not None for name, value in others.items() if name != "cache_position") and not (
        others.keys() <= {"cache_position", "return_dict", "output_attentions", "output_hidden_states"}
        and others.get("return_dict") is not False
        and not others.get("output_attentions")
        and not others.get("output_hidden_states")
    )


def _mask(given: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | Literal[False] | None:
    """Return a mask (B, 1, 1, L), True where a position is seen; None if all are; False for another kind of mask."""
    if given is None:
        return None
    if given.shape != (batch, length) or given.dtype not in (torch.bool, torch.int64):
        return False
    if given.all():
        return None
    return given.bool()[:, None, None]


class Norm:
    """RMSNorm: the mean square in float32, as the model's own has it."""

    def __init__(self, module: Any, dtype: torch.dtype):
        self.weight, self.eps = module.weight, module.variance_epsilon
        self.width = self.weight.shape[-1]
        self.nothing = torch.zeros(1, self.width, dtype=dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of x (B, H), aligned."""
        if x.shape[0] > 1:
            return scaled(x, self.eps) * self.weight
        length = float(torch.linalg.vector_norm(x, dtype=torch.float32))
        return torch.addcmul(self.nothing, x, self.weight, value=1 / math.sqrt(length * length / self.width + self.eps))


def scaled(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the rows of x divided by the roots of their mean squares."""
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Block:
    """One decoder block: its weights, and what is to be done with them."""

    def __init__(self, layer: Any, dtype: torch.dtype, room: Room):
        attention, mlp = layer.self_attn, layer.mlp
        self.before_attention = Norm(layer.input_layernorm, dtype)
        self.before_mlp = Norm(layer.post_attention_layernorm, dtype)
        self.qkv = product([attention.q_proj, attention.k_proj, attention.v_proj], dtype, room)
        self.output = product([attention.o_proj], dtype, room)
        self.gate_up = product([mlp.gate_proj, mlp.up_proj], dtype, room)
        self.down = product([mlp.down_proj], dtype, room)
        self.activation = torch._C._nn.silu if isinstance(mlp.act_fn, torch.nn.SiLU) else mlp.act_fn
        self.width = attention.head_dim
        self.shared = attention.k_proj.out_features // self.width
        self.heads = attention.q_proj.out_features // self.width
        self.inner = mlp.gate_proj.out_features
        self.scaling = attention.scaling
        self.turns = getattr(attention, "use_rope", True)
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            weights = (attention.q_norm.weight, attention.k_norm.weight)
            rows = [w.expand(n, -1) for w, n in zip(weights, (self.heads, self.shared), strict=True)]
            self.head_norm = torch.cat(rows), attention.q_norm.variance_epsilon

    def __call__(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past: GrowingLayer,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the hidden states (B, H) behind this block. cos, sin: (B, 1, D); the first half of sin is negated."""
        batch, heads, shared, width = hidden.shape[0], self.heads, self.shared, self.width
        states = self.qkv(self.before_attention(hidden)).view(batch, -1, width)
        turned = states.narrow(1, 0, heads + shared)
        if self.head_norm is not None:
            weight, eps = self.head_norm
            turned.copy_(scaled(turned, eps) * weight)
        if self.turns:
            other = turned.roll(width // 2, -1)
            turned.mul_(cos).addcmul_(other, sin)
        keys, values = past.append(states.narrow(1, heads, 2 * shared))
        query = states.narrow(1, 0, heads).view(batch, shared, -1, width)
        groups = query.shape[2]
        if groups == 1 and query.dtype != torch.float32:
            query = query.expand(-1, -1, 2, -1)  # in half precision two rows take half the time of one
        seen = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)
        if groups == 1:
            seen = seen.narrow(2, 0, 1)
        hidden = self.output(seen.reshape(batch, -1)).add_(hidden)
        both = self.gate_up(self.before_mlp(hidden))
        gate, up = both.narrow(1, 0, self.inner), both.narrow(1, self.inner, self.inner)
        return self.down(self.activation(gate).mul_(up)).add_(hidden)
