"""What a plan is held against: this machine, or a GPU by its name."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.system import hardware

GIB = 1024**3

# What torch finds on a GPU of that name, in GiB: less than what the box says, for the driver and error
# correction take a part.
DEVICES = {
    "t4-16gb": 14.6,
    "l4-24gb": 22.0,
    "a10g-24gb": 22.1,
    "l40s-48gb": 44.4,
    "a100-40gb": 39.4,
    "a100-80gb": 79.2,
    "h100-80gb": 79.1,
    "h200-141gb": 139.7,
    "b200-180gb": 178.3,
    "mi300x-192gb": 191.5,
    "rtx-3060-12gb": 11.6,
    "rtx-3090-24gb": 23.6,
    "rtx-4060ti-16gb": 15.6,
    "rtx-4090-24gb": 23.5,
    "rtx-5090-32gb": 31.4,
}


@dataclass(frozen=True)
class Machine:
    """What there is to run on. Bytes; None where it is not known.

    Attributes:
        name: processor, cores and GPU, which tell machines apart whose speed differs; or the GPU that was named.
        gpu_bytes: memory of one GPU that can be used; 0 where there is none.
        host_bytes: main memory that can be used.
        disk_free: free on the disk of the runs' folder; None for other machines.
        cache_free: free on the disk of the Hub's cache.
        is_here: whether it is this machine, for whose speed there may be a calibration.
    """

    name: str
    gpu_bytes: int = 0
    host_bytes: int | None = None
    disk_free: int | None = None
    cache_free: int | None = None
    one_disk: bool = False
    is_here: bool = False

    @property
    def has_gpu(self) -> bool:
        return self.gpu_bytes > 0


def named(name: str) -> Machine:
    """A GPU of the table, whatever machine it is in.

    Raises:
        ConfigError: where there is none of that name.
    """
    key = name.strip().lower()
    if key not in DEVICES:
        raise ConfigError(f"--device {name}: not known; known are {', '.join(DEVICES)}")
    return Machine(key, gpu_bytes=int(DEVICES[key] * GIB))


def this_machine(runs: Path) -> Machine:
    """The machine that this runs on; torch is imported only where a GPU may be found with it."""
    gpu = gpu_here()
    gpu_name = gpu[0] if gpu else "without a GPU"
    computing = f"computing in {asked}" if (asked := os.environ.get(hardware.COMPUTE_DTYPE)) else ""
    free = hardware.free_host_bytes()
    runs, cache = existing(runs), existing(hub_cache())
    return Machine(
        name=", ".join(filter(None, (hardware.cpu_name(), f"{hardware.cores()} cores", gpu_name, computing))),
        gpu_bytes=(gpu[1] or 0) if gpu else 0,
        host_bytes=hardware.memory_bytes() if free is None else free,
        disk_free=shutil.disk_usage(runs).free,
        cache_free=shutil.disk_usage(cache).free,
        one_disk=runs.stat().st_dev == cache.stat().st_dev,
        is_here=True,
    )


def gpu_here() -> tuple[str, int | None] | None:
    """Name and free memory in bytes of the GPU that stages would use; None where there is none.

    Asking takes some of it, `memory.CUDA_CONTEXT` at most, until this process ends; that is not added again.
    """
    if not may_have_gpu():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), hardware.free_bytes(torch.device("cuda", 0))


def may_have_gpu() -> bool:
    """Could torch find one? Neither without a driver nor with a build for processors alone."""
    driver = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/proc/driver/nvidia"))
    try:
        return driver and "+cpu" not in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def hub_cache() -> Path:
    """Where the Hub's client keeps models."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
