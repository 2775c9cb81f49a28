"""Each weight's share of the loss of a rounded model, from one gradient pass of one decoder block at a time.

To second order, the KL divergence to the full-precision model is 1/2 D' H D, with D the change of all weights. Its
gradient at the rounded weights is H D. So a weight's share is 1/2 <gradient, change>, and the shares add up to about
the divergence itself, with all interactions between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.collect import batches_of
from pipeline.quantization.grid import GroupQuantized

PIECE_ELEMENTS = 1 << 24  # logits held at a time

Rounded = Mapping[str, GroupQuantized]  # name of a weight -> its codes; they are read when they are needed
Tell = Callable[[int, int], None]  # called with the blocks done, and the blocks in all


class OutputHead(Protocol):
    """The function from last hidden states to logits; `inference.output_head.Head` is one."""

    rows: int

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (T, V) of hidden states (T, H)."""

    def gradient(self, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient (T, H) for the hidden states, given that for their logits (T, V)."""


@dataclass(frozen=True)
class Shares:
    """The loss of a rounded model, and where it comes from.

    Attributes:
        kl: KL divergence to the full-precision model, in nats a token.
        by_weight: each rounded weight's share of it; a tied table's covers the embedding and the head.
    """

    kl: float
    by_weight: dict[str, float]


def shares(
    model: BlockwiseModel,
    heads: tuple[OutputHead, OutputHead],
    rounded: Rounded,
    windows: Sequence[list[int]],
    scratch: Path,
    tell: Tell,
    head_name: str | None = None,
) -> Shares:
    """Measure the shares of all rounded weights.

    Memory holds one block, and the activations of all windows at one border between blocks.

    Args:
        model: the full-precision model.
        heads: the output head in full precision, and rounded; the same one twice if it is not rounded.
        rounded: weights on their grids.
        windows: text, as windows of token ids.
        scratch: an empty folder for activations.
        head_name: the weight of the output head, if it is rounded.
    """
    batches, steps = batches_of(windows), 2 * model.count
    tokens = sum(map(len, windows))
    full, states = enter(model, {}, batches), enter(model, rounded, batches)
    embedded = [(s - f).float() for s, f in zip(states, full, strict=True)]
    found = dict.fromkeys(rounded, 0.0)
    for block in range(model.count):
        with model.loaded(block):
            full = [model.run(block, ids, hidden) for ids, hidden in zip(batches, full, strict=True)]
            keep_border(scratch, block, states)
            with model.replaced(dequantized(model, rounded, model.weights_of(block))):
                states = [model.run(block, ids, hidden) for ids, hidden in zip(batches, states, strict=True)]
        tell(block + 1, steps)
    total, gradients = 0.0, []
    for ids, hidden, exact in zip(batches, states, full, strict=True):
        ends = model.finish(ids, hidden), model.finish(ids, exact)
        flat = [end.flatten(0, 1) for end in ends]
        gradient = torch.empty_like(flat[0])
        for rows, logits, wanted in pieces(heads[1], flat[0], heads[0], flat[1]):
            kl, slope = divergence(logits, wanted, tokens)
            total += kl
            gradient[rows] = heads[1].gradient(logits, slope).to(gradient.dtype)
            if head_name in found:
                found[head_name] += float((slope * (logits - heads[0](flat[0][rows]))).sum()) / 2
        gradients.append(model.differentiate_end(ids, hidden, gradient.view_as(ends[0])))
    for block in reversed(range(model.count)):
        states = border(scratch, block, model.device)
        weights = dequantized(model, rounded, model.weights_of(block))
        with model.loaded(block), model.replaced(weights, trained=True):
            for number, ids in enumerate(batches):
                gradients[number] = model.differentiate(block, ids, states[number], gradients[number])
            for name, weight in weights.items():
                change = weight - model.weight(name).to(weight)
                found[name] += float((model.gradient_of(name).to(weight) * change).sum()) / 2
        tell(steps - block, steps)
    if model.table in found:
        products = (float((g.float() * e).sum()) for g, e in zip(gradients, embedded, strict=True))
        found[model.table] += sum(products) / 2
    return Shares(total, found)


def enter(model: BlockwiseModel, rounded: Rounded, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the inputs (B, T, H) of the first block for each batch of tokens (B, T)."""
    with model.embedding(), model.replaced(dequantized(model, rounded, [model.table])):
        return [model.enter(ids) for ids in batches]


def dequantized(model: BlockwiseModel, rounded: Rounded, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return those of these weights that are rounded, (N, K) float32, on the device of the model."""
    return {name: rounded[name].to(model.device).dequantize() for name in names if name in rounded}


def pieces(
    head: OutputHead, states: torch.Tensor, other: OutputHead, others: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (rows, logits, the other's logits) of states (T, H) in pieces that fit."""
    step = max(1, PIECE_ELEMENTS // head.rows)
    for first in range(0, len(states), step):
        rows = slice(first, min(first + step, len(states)))
        yield rows, head(states[rows]), other(others[rows])


def divergence(logits: torch.Tensor, wanted: torch.Tensor, tokens: int) -> tuple[float, torch.Tensor]:
    """Return KL(wanted || given) as a sum over rows divided by `tokens`, and its gradient for the logits (T, V)."""
    log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    kl = float((p * (log_p - log_q)).sum()) / tokens
    return kl, log_q.exp_().sub_(p).div_(tokens)


def keep_border(folder: Path, block: int, states: Sequence[torch.Tensor]) -> None:
    """Write the inputs of a block to a file."""
    tensors = {str(number): hidden.cpu().contiguous() for number, hidden in enumerate(states)}
    save_file(tensors, _border(folder, block))


def border(folder: Path, block: int, device: torch.device) -> list[torch.Tensor]:
    """Return the inputs of a block, on a device."""
    kept = load_file(_border(folder, block), str(device))
    return [kept[str(number)] for number in range(len(kept))]


def _border(folder: Path, block: int) -> Path:
    return folder / f"border-{block:04}.safetensors"
