"""The machines that a run is planned for: this one, or a GPU by its name."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.system import hardware

GIB = 1024**3

# GiB that torch finds on such a GPU. The driver and error correction take a part of the advertised memory.
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
    """A machine by its memory and disks. Bytes; None if not known.

    Attributes:
        name: processor, cores and GPU, which decide its speed; or the name of a GPU of the table.
        gpu_bytes: usable memory of one GPU; 0 without a GPU.
        host_bytes: usable main memory.
        disk_free: free space on the disk of the runs' folder.
        cache_free: free space on the disk of the Hub's cache.
        one_disk: True if both are the same disk.
        is_here: True for this machine, whose speed may have been measured.
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
        """Return True if a GPU is there."""
        return self.gpu_bytes > 0


def gpu_by_name(name: str) -> Machine:
    """Return a GPU of the table, in a machine of which nothing else is known.

    Raises:
        ConfigError: if the table has no such name.
    """
    key = name.strip().lower()
    if key not in DEVICES:
        raise ConfigError(f"--device: unknown device ({name}). Try: one of {', '.join(DEVICES)}")
    return Machine(key, gpu_bytes=int(DEVICES[key] * GIB))


def this_machine(runs: Path) -> Machine:
    """Return the machine that this runs on; torch is imported only if it may find a GPU."""
    gpu = gpu_here()
    gpu_name = gpu[0] if gpu else "without a GPU"
    computing = f"computing in {asked}" if (asked := os.environ.get(hardware.COMPUTE_DTYPE)) else ""
    free = hardware.free_host_bytes()
    runs, cache = nearest_folder(runs), nearest_folder(hub_cache())
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
    """Return name and free bytes of the GPU that stages use; None without a GPU.

    The question itself takes up to `memory.CUDA_CONTEXT` of that memory until this process ends.
    """
    if not may_have_gpu():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), hardware.free_bytes(torch.device("cuda", 0))


def may_have_gpu() -> bool:
    """Return True if torch may find a GPU: there is a driver, and torch is not a CPU build."""
    driver = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/proc/driver/nvidia"))
    try:
        return driver and "+cpu" not in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def hub_cache() -> Path:
    """Return the folder of the Hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def nearest_folder(path: Path) -> Path:
    """Return the folder, or the nearest existing one above it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
