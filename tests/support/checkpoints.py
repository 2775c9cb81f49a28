"""Changed copies of checkpoints, and comparison of the headers of safetensors files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.models.checkpoint import SINGLE_NAME


def rewrite(source: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """Copy a model to `folder`, and change its tensors, which are given by name."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    return folder


def unprefixed(tensors: dict) -> None:
    """Name tensors as in a checkpoint that was saved from the bare decoder."""
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def assert_same_headers(ours: Path, saved: Path) -> None:
    """Fail if the header in a folder of ours differs from that of a folder saved by transformers."""
    with safe_open(ours / SINGLE_NAME, "pt") as first, safe_open(saved / SINGLE_NAME, "pt") as second:
        written, theirs, stored = plain(first.metadata()), plain(second.metadata()), set(second.keys())
    for name in [n for n in theirs["tensor_names"] if theirs[n] == {"_type": "Tensor"} and n not in stored]:
        del theirs[name]  # a tied head, which it describes and does not store
        theirs["tensor_names"].remove(name)
    assert written == theirs


def plain(metadata: dict[str, str]) -> dict:
    """Metadata with its JSON read, and the one list in it that has no order."""
    content = {key: value if key == "format" else json.loads(value) for key, value in metadata.items()}
    return content | {"tensor_names": sorted(content["tensor_names"])}
