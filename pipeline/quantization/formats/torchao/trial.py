"""A trial on the meta device: can stock transformers run a model whose layers are tensors of torchao?

Some architectures use the weights of their linear layers themselves, and torchao's tensors have only the product of a
linear layer. No weight is read, and nothing is computed.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError
from pipeline.models.matrices import linear_weights, model_layout, skeleton

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch

TOKENS = 8


def unusable_layers(
    folder: Path, keep: Collection[str], tensor: Callable[[tuple[int, int]], torch.Tensor]
) -> list[str]:
    """Return patterns of the names of layers that stock transformers cannot run as tensors of torchao.

    A well-known architecture needs no trial. Nothing is returned for a model that transformers cannot build, which
    `linear_weights` says, or that does not run on the meta device at all: then measuring decides.

    Args:
        folder: of the model; only its configuration is read.
        keep: patterns of the names of layers that stay as they are, as `keep` has them.
        tensor: makes the tensor of a layer of shape (N, K), on the meta device.
    """
    if model_layout(folder):
        return []
    with suppress(ModelError):
        return list(_unusable(folder, (folder / "config.json").read_bytes(), tuple(sorted(keep)), tensor))
    return []


@functools.lru_cache(maxsize=8)
def _unusable(folder: Path, config: bytes, keep: tuple[str, ...], tensor: Callable) -> tuple[str, ...]:
    linear = [name.removesuffix(".weight") for name in linear_weights(folder)]
    names = [name for name in linear if not any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)]
    if _runs(folder, names, tensor) or not _runs(folder, [], tensor):
        return ()
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(name)
    alone = [kind for kind, of_kind in kinds.items() if not _runs(folder, of_kind, tensor)]
    return tuple(alone or kinds)


def _runs(folder: Path, names: Collection[str], tensor: Callable) -> bool:
    """Return True if a model runs on the meta device with tensors of torchao in these layers."""
    import torch

    model = skeleton(folder).eval()
    model.config._is_quantized = True  # as transformers marks it; some architectures then call their layers
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = torch.nn.Parameter(tensor(tuple(layer.weight.shape)), requires_grad=False)
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _guesses():
            model(input_ids=ids, use_cache=False)
    except Exception:  # tensors that lack an operation raise anything
        return False
    return True


def _guesses() -> Any:
    """Return a mode in which conditions on tensors without values are true."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Guesses(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable, types: Any, arguments: tuple = (), options: dict | None = None
        ) -> Any:
            if function is torch.Tensor.__bool__ and arguments[0].is_meta:
                return True
            return function(*arguments, **(options or {}))

    return Guesses()
