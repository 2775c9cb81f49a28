"""Checks of an architecture on the loaded model, which take a few tokens and come before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.errors import ModelError
from pipeline.inference.kernels.attention import MODELS
from pipeline.inference.output_head import HEAD_TOLERANCE, check_head, head_of
from pipeline.system import hardware
from pipeline.training.fused_layers import frozen_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

LENGTHS = (7, 6)  # tokens of the two short sequences
ALONE_TOLERANCE = 0.1  # relative; far above the rounding of bfloat16, far below the trace of wrong positions


def packs_apart(model: PreTrainedModel) -> bool:
    """Return True if two sequences that trl packs into one row do not see each other.

    The states of the second sequence must not depend on the first: their gradient there is zero, exactly and for any
    stored type of weights. They must also be those of the sequence alone, which tells wrong positions.

    The loaded model is asked, since the answer depends on the kernels of this machine and not on the configuration
    alone. The model may not be sharded yet, except by DeepSpeed, where only well-known architectures are packed.

    Args:
        model: the base model without an adapter.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return model.config.model_type in MODELS
    # One process asks: under FSDP the others may have no weights yet, and all of them must pack alike.
    answer = [_packs_apart(model)] if PartialState().is_main_process else [None]
    return cast(bool, broadcast_object_list(answer)[0])


def _packs_apart(model: PreTrainedModel) -> bool:
    embedding, bound = model.get_input_embeddings(), LENGTHS[0]
    vocabulary, device = model.config.get_text_config().vocab_size, cast(torch.Tensor, embedding.weight).device
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in LENGTHS]
    packed = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": row} for row in rows])
    del packed["labels"]
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in packed.items()}
    looked_up: list[torch.Tensor] = []

    def watch(layer: torch.nn.Module, arguments: Any, states: torch.Tensor) -> torch.Tensor:
        looked_up.append(states.detach().requires_grad_())
        return looked_up[-1].clone()  # some models change their inputs in place

    with _evaluating(model), _quick_layers(model):
        with torch.no_grad():
            alone = model.base_model(input_ids=torch.tensor(rows[1:], device=device), use_cache=False)[0][0]
        hook = embedding.register_forward_hook(watch)
        try:
            states = model.base_model(**given, use_cache=False)[0][0, bound:]
            # Random factors: the sum of normalized states would have no gradient.
            factors = torch.randn(states.shape, generator=draw).to(states)
            (gradient,) = torch.autograd.grad((states * factors).sum(), looked_up)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # an architecture that takes no packed rows raises anything
            return False
        finally:
            hook.remove()
    first, second = gradient.view(sum(LENGTHS), -1).float().split(LENGTHS)
    apart = float((states.detach().float() - alone.float()).norm()) <= ALONE_TOLERANCE * float(alone.float().norm())
    return apart and float(first.norm()) == 0 and float(second.norm()) > 0


def check_logits(base: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Raise unless training and measuring compute the logits of the model's own forward.

    Args:
        base: the model without peft's wrapper, prepared for training by trl.
        tokens: a few tokens of the training data.

    Raises:
        ModelError: if the loss of training or the head for measuring gives something else.
    """
    device = cast(torch.Tensor, base.get_input_embeddings().weight).device
    ids = torch.tensor([tokens], device=device)
    with _evaluating(base), torch.no_grad():
        check_head(base, base.base_model, head_of(base), tokens)
        own = base(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found = base(input_ids=ids, labels=ids.clone(), fused_lm_head=True).log_probs[0].float()
    expected = own.gather(1, ids[0, 1:, None]).squeeze(1)
    if not (found - expected).norm() <= HEAD_TOLERANCE * expected.norm():
        raise ModelError(
            f"{base.config.model_type}: the loss that trl computes is not that of the model's own logits. "
            "Try: another architecture"
        )


@contextmanager
def _quick_layers(model: torch.nn.Module) -> Iterator[None]:
    """Multiply in the compute type on a CPU without fast products for the type of the weights."""
    dtype = hardware.compute_dtype("cpu")
    slow = [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype != dtype
    ]

    def forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return frozen_layer(layer, x).to(x.dtype)

    for layer in slow:
        layer.compute_dtype = dtype  # type: ignore[assignment]  # torch declares attributes as tensors or modules
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]  # of this one layer
    try:
        yield
    finally:
        for layer in slow:
            del layer.forward, layer.compute_dtype


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a model without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
