"""Comparison of the headers of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from pipeline.models.checkpoint import SINGLE_NAME


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
