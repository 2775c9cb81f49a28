"""Mixtures of experts: single matrices in the checkpoint, and stacks of them in the model.

A checkpoint has one matrix for each part of each expert. transformers computes with stacks of shape
(experts, rows, columns), and joins the gate and the upper part in one stack. Its table of conversions says which
matrix goes where. Routers and other gates lie beside the experts; they are small, and are never quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

EXPERTS = ".experts."  # in the names of their weights
_ROUTERS = ("router", "gate")  # modules beside experts that hold the weight of a router
_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertPlace:
    """The place of an expert's matrix in the stacks of the model.

    Attributes:
        stack: name of the stack.
        stack_shape: (experts, rows, columns) of the stack.
        shape: (N, K) of the matrix.
        first_row: number of its first row, with the rows of all experts counted through.
    """

    stack: str
    stack_shape: tuple[int, int, int]
    shape: tuple[int, int]
    first_row: int


def is_expert(name: str) -> bool:
    """Return True if a checkpoint's weight belongs to one expert."""
    return _NUMBER.search(name) is not None


def expert_number(name: str) -> int:
    """Return the number of the expert that a checkpoint's weight belongs to."""
    found = _NUMBER.search(name)
    assert found is not None, "a weight of an expert"
    return int(found[1])


def without_number(name: str) -> str:
    """Return the name that the weights of all experts share."""
    return _NUMBER.sub(EXPERTS, name)


def gates(names: Iterable[str]) -> set[str]:
    """Return the weights of routers and of gates of shared experts: directly beside experts, or in a module there."""
    known = list(names)
    blocks = {name.partition(EXPERTS)[0] for name in known if EXPERTS in name}
    found = set()
    for name in (name for name in known if name.endswith(".weight")):
        above, *_ = name.rsplit(".", 2)
        parent, _, module = above.rpartition(".")
        if above in blocks or (module in _ROUTERS and parent in blocks):
            found.add(name)
    return found


def expert_places(model: Any) -> dict[str, ExpertPlace]:
    """Return the place of each expert's matrix in a model of transformers, by its name in a checkpoint.

    Only stacks of whole matrices are known. Empty for a model without such stacks, or with other conversions.
    """
    from transformers.core_model_loading import rename_source_key, revert_weight_conversion

    renamings, converters = conversion_rules(model)
    stacking = [rule for rule in converters if _is_stacking(rule)]
    parts = {source: rule.source_patterns for rule in stacking for source in rule.source_patterns}
    wanted = model.state_dict()
    stacks = {name: tensor for name, tensor in wanted.items() if tensor.ndim == 3 and EXPERTS in name}
    places: dict[str, ExpertPlace] = {}
    for name, tensor in revert_weight_conversion(model, stacks).items() if stacking and stacks else ():
        stack, source = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if stack in stacks and source in parts and is_expert(name):
            (rows, width), siblings = tensor.shape, parts[source]
            first = expert_number(name) * rows * len(siblings) + siblings.index(source) * rows
            places[name] = ExpertPlace(stack, tuple(stacks[stack].shape), (rows, width), first)
    return places


def conversion_rules(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the renamings and the converters with which transformers reads a checkpoint of a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _is_stacking(rule: Any) -> bool:
    """Return True if a converter puts matrices one upon the other and does nothing else."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *others = rule.operations
    if type(first) is not MergeModulelist or first.dim != 0:
        return False
    return not others or (len(others) == 1 and type(others[0]) is Concatenate and others[0].dim == 1)
