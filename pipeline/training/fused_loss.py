"""A fused loss for LoRA training on a CPU: only counted positions go through the output head, and only once.

trl scores every position, and scores it again for the gradient. Here the gradient of each counted position is kept.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch

from pipeline.training.fused_layers import fuse_layers, sum_of_rows, times_transposed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LOGIT_ELEMENTS = 1 << 23  # logits in memory at a time: 32 MB of float32


def fuse_training_step(model: PeftModel, dtype: torch.dtype, mean_logits: bool = False) -> None:
    """Make a model with LoRA adapters on a CPU train in `dtype`, with fused layers and a fused loss.

    Call it after trl's trainer has prepared the model, because it replaces trl's loss.

    Args:
        model: the model, on a CPU.
        dtype: the compute type: bfloat16 or float32.
        mean_logits: also return the mean logit of each counted position, as trainers of preferences log it.
    """
    fuse_layers(model, dtype)
    fuse_loss(cast("PreTrainedModel", model.get_base_model()), dtype, mean_logits)


def fuse_loss(model: PreTrainedModel, dtype: torch.dtype, mean_logits: bool = False) -> None:
    """Replace trl's fused output head, if the head is a frozen matrix; it may have a bias, a scale and a bound."""
    from trl.trainer.utils import FusedCausalLMOutput

    from pipeline.inference.output_head import logit_settings

    head, config = model.get_output_embeddings(), model.config.get_text_config()
    frozen = head is not None and not any(parameter.requires_grad for parameter in head.parameters())
    if not frozen or getattr(config, "output_router_logits", False):
        return
    trl_forward, (scale, softcap) = model.forward, logit_settings(config)

    def forward(
        self: PreTrainedModel,
        *arguments: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **settings: Any,
    ) -> FusedCausalLMOutput:
        if labels is None or not fused_lm_head or settings.get("shift_labels") is not None:
            return trl_forward(*arguments, fused_lm_head=fused_lm_head, labels=labels, **settings)
        count = settings.pop("num_items_in_batch", None)
        settings["use_cache"] = False  # with a cache, transformers does not look for packed sequences
        states = self.base_model(*arguments, **settings)[0][:, :-1]
        mask = labels[:, 1:] != -100
        rest = head.bias, scale, softcap, dtype, mean_logits
        found = _TokenLogProbs.apply(states[mask], head.weight, labels[:, 1:][mask], *rest)
        log_probs, entropy, is_top1, *means = (
            values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found if values is not None
        )
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count)
        more = {"mean_logits": means[0]} if means else {}
        return FusedCausalLMOutput(
            loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask, **more
        )

    model.forward = MethodType(forward, model)


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities of tokens, the entropy of each distribution, and whether each token is the most likely one.

    Shapes: states (T, H), head (V, H), targets (T), bias (V) or None -> three of (T), and the mean logits (T) if
    `mean_logits`, else None. The logits are
    `softcap(scale * (states head^T + bias))`, and never in memory for all tokens. For the backward pass the gradient
    of each log-probability is kept, (T, H).
    """

    @staticmethod
    def forward(ctx, states, head, targets, bias, scale, softcap, dtype, mean_logits):
        log_probs, entropy = states.new_empty(2, len(states), dtype=torch.float32)
        first = torch.empty(len(states), dtype=torch.bool)
        means = torch.empty(len(states)) if mean_logits else None
        gradient = torch.empty(states.shape, dtype=dtype) if ctx.needs_input_grad[0] else None
        step = max(1, LOGIT_ELEMENTS // len(head))
        for start in range(0, len(states), step):
            rows = slice(start, start + step)
            logits, chosen = times_transposed(states[rows].to(dtype), head.detach()).float(), targets[rows, None]
            if bias is not None:
                logits += bias
            if scale != 1.0:
                logits *= scale
            bounded = None
            if softcap is not None:
                bounded = logits.div_(softcap).tanh_()
                logits = bounded * softcap
            first[rows] = logits.argmax(-1) == chosen.squeeze(1)
            if means is not None:
                means[rows] = logits.mean(-1)
            logits -= logits.amax(-1, keepdim=True)
            of_chosen = logits.gather(1, chosen).squeeze(1)
            probabilities = logits.exp()
            total = probabilities.sum(-1, keepdim=True)
            probabilities /= total
            log_total = total.squeeze(1).log()
            log_probs[rows] = of_chosen - log_total
            entropy[rows] = log_total - torch.bmm(probabilities[:, None], logits[:, :, None]).view(-1)
            if gradient is None:
                continue
            slope = probabilities.neg_()
            slope.scatter_add_(1, chosen, slope.new_ones(chosen.shape))
            if bounded is not None:
                slope *= 1 - bounded.square_()
            if scale != 1.0:
                slope *= scale
            gradient[rows] = sum_of_rows(slope.to(dtype), head.detach())
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        ctx.mark_non_differentiable(entropy, first, *(() if means is None else (means,)))
        return log_probs, entropy, first, means

    @staticmethod
    def backward(ctx, of_log_probs, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * of_log_probs[:, None]).to(ctx.dtype), None, None, None, None, None, None, None
