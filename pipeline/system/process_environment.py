"""Environment variables of child processes: memory settings of stages, secrets, and the path to this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import is_secret_variable

# glibc returns every large block to the system at once, and the next block costs page faults again.
# Training on a CPU then spends more time on page faults than on arithmetic. These settings keep the memory.
ALLOCATOR = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
# oneDNN and torch cache a program of one or two megabytes for each of the last 1024 shapes.
# Every training step brings new lengths, so the caches are kept small.
STAGE_SETTINGS = {
    "GLIBC_TUNABLES": ALLOCATOR,
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}


def user_environment() -> dict[str, str]:
    """Return the environment of a process that only opens a model: as a user has it, but without any secret."""
    kept = {k: v for k, v in os.environ.items() if STAGE_SETTINGS.get(k) != v and not is_secret_variable(k)}
    return kept | {"HF_TOKEN_PATH": os.devnull}


def with_own_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with a PYTHONPATH by which `python -P` finds this package, installed or not."""
    paths = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
