"""The tensors of a checkpoint beside those that its model needs: other names, missing tensors, other shapes.

transformers draws a missing tensor at random, and only logs that. It also reads some tensors under other names, such as
those that were saved from the decoder alone. Here such names are read in the same way, missing tensors are refused, and
tensors that the model does not read are told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import conversion_rules
from pipeline.models.layer_layouts import TIED_HEAD
from pipeline.models.matrices import linear_layers, model_layout, skeleton
from pipeline.models.safe_loading import refuse_missing, some_names

COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # stored by old versions, and never read


def open_checkpoint(
    folder: Path,
    checkpoint: Checkpoint | None = None,
    to_copy: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> Checkpoint:
    """Return the checkpoint of a full-precision model, with its tensors under the names that the model has for them.

    A well-known architecture whose tensors are all there needs no transformers.

    Args:
        folder: holds the model's configuration.
        checkpoint: its tensors, if they are not in `folder`; they are renamed in place.
        to_copy: keep the names if every linear layer is found by them, because other programs may know no others.
        tell: called with a line if there are tensors that the model does not read.

    Raises:
        ModelError: if a tensor that the model needs is missing or has another shape.
        CheckpointError: if the files are damaged.
    """
    checkpoint = Checkpoint(folder) if checkpoint is None else checkpoint
    if known := model_layout(folder):
        expected = known.linear | known.tables | known.vectors
        if expected.keys() <= checkpoint.keys():
            _check_shapes(folder, checkpoint, {}, expected)
            _tell_unread(folder, checkpoint.keys() - expected.keys() - {TIED_HEAD}, (), tell)
            return checkpoint
    model = skeleton(folder)
    read_as = _read_as(model, checkpoint.keys())
    _check_missing(folder, model, {*read_as.names.values(), *read_as.converted})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_shapes(folder, checkpoint, read_as.names, {n: s for n, s in shapes.items() if n not in read_as.converted})
    unread = checkpoint.keys() - read_as.names.keys() - read_as.sources
    _tell_unread(folder, unread, model._keys_to_ignore_on_load_unexpected or (), tell)
    is_usable = to_copy and linear_layers(model).keys() <= checkpoint.keys()
    if not read_as.converted and not is_usable:  # a half of the names would stay if tensors are put together
        checkpoint.rename(read_as.names)
    return checkpoint


@dataclass(frozen=True)
class _ReadAs:
    """The way in which transformers reads the tensors of a checkpoint.

    Attributes:
        names: stored name -> name in the model.
        sources: names of stored tensors that are put together or taken apart, such as single experts.
        converted: names in the model of what is made of those.
    """

    names: dict[str, str]
    sources: set[str]
    converted: set[str]


def names_in_model(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Return the names that a model has for tensors of a checkpoint: stored name -> name in the model."""
    return _read_as(model, stored).names


def _read_as(model: Any, stored: Collection[str]) -> _ReadAs:
    """Return how transformers reads stored tensors, as it renames them when it loads a model."""
    from transformers.core_model_loading import rename_source_key

    wanted, prefix = model.state_dict(), model.base_model_prefix
    renamings, converters = conversion_rules(model)
    targets = {source: rule.target_patterns for rule in converters for source in rule.source_patterns}
    read = _ReadAs({}, set(), set())
    for name in stored:
        found, source = rename_source_key(name, renamings, converters, prefix, wanted)
        if found not in wanted and name in wanted:
            found, source = rename_source_key(name, [], [], prefix, wanted)
        if source is not None:
            first, *others = targets[source]
            read.sources.add(name)
            read.converted.update({found, *(found.replace(first, other) for other in others)})
        elif found in wanted and (found == name or found not in stored):
            read.names[name] = found
    for name, source in model.all_tied_weights_keys.items():  # some checkpoints store the one table as the head
        if read.names.get(name) == name and source not in read.names.values():
            read.names[name] = source
    return read


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


def _check_shapes(
    folder: Path, checkpoint: Checkpoint, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise an error if a tensor has another shape than the model; `names` are those in the model, if they differ."""
    stored = {names.get(name, name): name for name in checkpoint}
    for name, shape in shapes.items():
        if name in stored and checkpoint[stored[name]].shape != tuple(shape):
            found = checkpoint[stored[name]].shape
            raise ModelError(
                f"{folder}: {stored[name]!r} is of {found} in its checkpoint, and of {tuple(shape)} in the model"
            )


def _tell_unread(folder: Path, names: Collection[str], ignored: Collection[str], tell: Callable[[str], object]) -> None:
    """Tell of tensors that the model does not read, except those that transformers expects."""
    expected = re.compile("|".join(f"({pattern})" for pattern in (*COMPUTED, *ignored)))
    if unread := sorted(name for name in names if not expected.search(name)):
        tell(f"{folder}: its checkpoint has {some_names(unread)}, which the model does not read; they are copied")
