"""The state that a training resumes from beside its weights, in safetensors instead of torch's pickles.

A state is plain data with tensors in it. Tensors are stored as they are, and everything else as JSON in the header.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.errors import CheckpointError


def save_state(path: Path, state: Any) -> None:
    """Write a state of dictionaries, lists, tuples, numbers, texts, tensors and numpy arrays.

    Raises:
        TypeError: for any other value.
    """
    tensors: dict[int, tuple[int, torch.Tensor]] = {}
    plan = _plan(state, tensors)
    stored = {str(number): tensor.detach().cpu().contiguous() for number, tensor in tensors.values()}
    # The format does not take two views of one storage.
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in stored.items()}
    stored = {name: t if owners[t.untyped_storage().data_ptr()] == name else t.clone() for name, t in stored.items()}
    save_file(stored, path, metadata={"state": json.dumps(plan)})


def load_state(path: Path) -> Any:
    """Return the state that `save_state` wrote, with tensors on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _value(json.loads(file.metadata()["state"]), file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path}: damaged, or of another kind. Try: remove its folder to resume without it"
        ) from None


def random_state() -> dict:
    """Return the states of all random number generators of this process."""
    on_gpu = torch.cuda.is_available()
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu else None,
    }


def set_random_state(state: dict) -> None:
    """Restore the states of all random number generators; that of a GPU only if there was one and is one."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _plan(value: Any, tensors: dict[int, tuple[int, torch.Tensor]]) -> Any:
    """Return a value as JSON: [kind, content]; a tensor is replaced by its number in `tensors`."""
    if isinstance(value, torch.Tensor):
        return ["tensor", tensors.setdefault(id(value), (len(tensors), value))[0]]
    if isinstance(value, np.ndarray):
        return ["array", [str(value.dtype), value.tolist()]]
    if isinstance(value, dict):
        return ["table", [[_plan(key, tensors), _plan(v, tensors)] for key, v in value.items()]]
    if isinstance(value, (list, tuple)):
        return ["tuple" if isinstance(value, tuple) else "list", [_plan(v, tensors) for v in value]]
    if isinstance(value, np.generic):
        return ["plain", value.item()]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["plain", value]
    raise TypeError(f"a {type(value).__name__} in a training's state, which is not stored")


def _value(plan: Any, file: Any) -> Any:
    kind, content = plan
    if kind == "tensor":
        return file.get_tensor(str(content))
    if kind == "array":
        return np.array(content[1], dtype=content[0])
    if kind == "table":
        return {_value(key, file): _value(value, file) for key, value in content}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_value(value, file) for value in content)
    if kind != "plain":
        raise ValueError(kind)
    return content
