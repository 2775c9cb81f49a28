"""The tensors of a checkpoint beside those that its model needs: other names, missing tensors, other shapes.

transformers draws a missing tensor at random, and only logs that. It also reads some tensors under other names, such as
those that were saved from the decoder alone. Here such names are read in the same way, and missing tensors are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import model_layout, skeleton
from pipeline.models.safe_loading import refuse_missing


def open_checkpoint(folder: Path, checkpoint: Checkpoint | None = None) -> Checkpoint:
    """Return the checkpoint of a full-precision model, with its tensors under the names that the model has for them.

    A well-known architecture whose tensors are all there needs no transformers.

    Args:
        folder: holds the model's configuration.
        checkpoint: its tensors, if they are not in `folder`; they are renamed in place.

    Raises:
        ModelError: if a tensor that the model needs is missing or has another shape.
        CheckpointError: if the files are damaged.
    """
    checkpoint = Checkpoint(folder) if checkpoint is None else checkpoint
    if known := model_layout(folder):
        expected = known.linear | known.tables | known.vectors
        if expected.keys() <= checkpoint.keys():
            _check_shapes(folder, checkpoint, expected)
            return checkpoint
    model = skeleton(folder)
    renamed, converted = _read_as(model, checkpoint.keys())
    if not converted:  # such a checkpoint is copied as it is, since a half of its names would stay
        checkpoint.rename(renamed)
    _check_missing(folder, model, {*checkpoint, *renamed.values(), *converted})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in converted}
    _check_shapes(folder, checkpoint, shapes)
    return checkpoint


def _read_as(model: Any, stored: Collection[str]) -> tuple[dict[str, str], set[str]]:
    """Return the names under which transformers reads stored tensors, as it renames them when it loads a model.

    Returns:
        Stored name -> name in the model, if they differ; and the tensors that transformers puts together from several,
        such as stacked experts, by their names in the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted, prefix = model.state_dict(), model.base_model_prefix
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    targets = {source: rule.target_patterns for rule in converters for source in rule.source_patterns}
    renamed, converted = {}, set()
    for name in stored:
        found, source = rename_source_key(name, renamings, converters, prefix, wanted)
        if found not in wanted and name in wanted:
            found, source = rename_source_key(name, [], [], prefix, wanted)
        if source is not None:
            first, *others = targets[source]
            converted |= {found, *(found.replace(first, other) for other in others)}
        elif found != name and found in wanted and found not in stored:
            renamed[name] = found
    for name, source in model.all_tied_weights_keys.items():  # some checkpoints store the one table as the head
        if name in stored and not {source, name} & {*renamed.values()} and source not in stored:
            renamed[name] = source
    return renamed, converted


def _check_missing(folder: Path, model: Any, stored: Collection[str]) -> None:
    """Raise an error if a parameter is neither stored nor tied to one that is."""
    tied = {name for name, source in model.all_tied_weights_keys.items() if source in stored}
    unread = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ())
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in stored and name not in tied and not (unread and re.search(unread, name))
    ]
    refuse_missing(folder, missing)


def _check_shapes(folder: Path, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name in checkpoint and checkpoint[name].shape != tuple(shape):
            found = checkpoint[name].shape
            raise ModelError(f"{folder}: {name!r} is of {found} in its checkpoint, and of {tuple(shape)} in the model")
