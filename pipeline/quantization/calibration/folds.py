"""Folds of a decoder block (`equivalences.folding`), found by trying, for any architecture.

A place is a fold if the block gives the same bits with it. No table of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.equivalences.folding import Fold, FoldedPowers

TRIED_TOKENS = 16
TRIED_EXPONENTS = 3  # at most: what is not a fold must change the block's output visibly
LARGEST_EXPONENT = 12
LARGEST_IN_HALF = 6  # if weights are stored or computed in float16, whose range is small


def find_folds(
    model: BlockwiseModel, block: int, together: Collection[Sequence[str]], ids: torch.Tensor, hidden: torch.Tensor
) -> list[Fold]:
    """Return the folds of a loaded block: at most one for the layers of each input.

    There are none if a layer of the block was not reached, because its input may be divided too.

    Args:
        model: the model.
        block: its number.
        together: the weights of the linear layers that were reached, those with the same input in one item.
        ids: tokens (B, T).
        hidden: the input (B, T, H) of the block.
    """
    if {name for names in together for name in names} != set(model.weights_of(block)):
        return []
    ids, hidden = ids[:1, :TRIED_TOKENS], hidden[:1, :TRIED_TOKENS]
    expected = model.run(block, ids, hidden)
    draw = torch.Generator().manual_seed(0)
    found: list[Fold] = []
    taken: set[str] = set()
    for consumers in together:
        for fold in _candidates(model, block, consumers):
            if taken.isdisjoint(fold.producer) and _is_fold(model, block, ids, hidden, expected, fold, draw):
                found.append(fold)
                taken.update(fold.producer)
                break
    return found


def computes_the_same(
    model: BlockwiseModel,
    block: int,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    expected: torch.Tensor,
    powers: FoldedPowers,
) -> bool:
    """Return True if a loaded block with changed weights gives the output that it gave before.

    Args:
        ids: tokens (B, T).
        hidden: the input (B, T, H) of the block.
        expected: its output (B, T, H).
    """
    changed = {name: powers.apply(name, model.skeleton.get_parameter(name).data, 0) for name in powers.names}
    with model.replaced(changed):
        found = model.run(block, ids, hidden)
    if model.dtype == torch.float16:
        return torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    return torch.equal(found, expected)


def largest_exponent(model: BlockwiseModel, names: Collection[str]) -> int:
    """Return the largest exponent that the types of some tensors allow."""
    types = {model.stored_dtype(name) for name in names} | {model.dtype}
    return LARGEST_IN_HALF if torch.float16 in types else LARGEST_EXPONENT


def _candidates(model: BlockwiseModel, block: int, consumers: Sequence[str]) -> Iterator[Fold]:
    """Yield what may be folds into these layers: of each norm of their width, then of each other linear layer."""
    width = model.linear[consumers[0]][1]
    inside = model.names_of(block)
    sizes = {name: model.skeleton.get_parameter(name).shape for name in inside if name.endswith(".weight")}
    for name, shape in sorted(sizes.items(), key=lambda item: item[1].numel()):
        if name in consumers or (name not in model.linear and len(shape) != 1):
            continue
        bias = f"{name.removesuffix('weight')}bias"
        producer = (name, bias) if bias in inside else (name,)
        for rows in _rows_of_columns(shape[0], width, model.skeleton.config):
            yield Fold(producer, tuple(consumers), rows)


def _rows_of_columns(rows: int, width: int, config: Any) -> Iterator[torch.Tensor]:
    """Yield the rows that the columns may come from: one by one, or from heads that several queries share."""
    if rows == width:
        yield torch.arange(width)
        return
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or width // heads
    if width % rows == 0 and rows % size == 0:
        yield torch.arange(rows).view(-1, 1, size).expand(-1, width // rows, -1).reshape(-1)


def _is_fold(
    model: BlockwiseModel,
    block: int,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    expected: torch.Tensor,
    fold: Fold,
    draw: torch.Generator,
) -> bool:
    """Return True if the block gives the same output with random exponents, and another one with half of the fold."""
    exponents = torch.randint(-TRIED_EXPONENTS, TRIED_EXPONENTS + 1, (fold.rows,), generator=draw)
    whole = FoldedPowers.of(fold, exponents)
    half = FoldedPowers(multiplied=whole.multiplied)
    return computes_the_same(model, block, ids, hidden, expected, whole) and not computes_the_same(
        model, block, ids, hidden, expected, half
    )
