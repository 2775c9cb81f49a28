"""The hardware of this machine, and the memory that a process used."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

COMPUTE_DTYPE = "TUNEPRESS_COMPUTE_DTYPE"  # environment variable: compute in this type, whatever the machine has
COMPUTE_DTYPES = ("bfloat16", "float32")

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h

# Of the free memory, what a model's weights may take; the rest is for activations, logits, and what loading needs.
WEIGHTS_SHARE = 0.75


def describe() -> dict[str, str | int | None]:
    """Return the machine as the card names it beside its figures; imports torch."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """Return the type in which `device` multiplies matrices of many rows fast.

    The *stored* type of weights is another matter: it never depends on the machine. A CPU computes in bfloat16 if it
    has instructions for it (AVX512-BF16, AMX, or ARM's), otherwise in float32, because torch then multiplies bfloat16
    by reference code: 5 to 10 times slower than float32, and 60 to 230 times for gradients. A GPU computes in bfloat16
    from compute capability 8.0 on, otherwise in float16.

    The environment variable `TUNEPRESS_COMPUTE_DTYPE` (bfloat16 or float32) overrides this.

    Raises:
        UserError: if that variable has another value.
    """
    import torch

    asked = os.environ.get(COMPUTE_DTYPE)
    if asked:
        check_compute_dtype()
        return getattr(torch, asked)
    device = torch.device(device)
    if device.type == "cuda":
        capable = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if capable else torch.float16
    return _compute_dtype_of_cpu()


def check_compute_dtype() -> None:
    """Raise a UserError if `TUNEPRESS_COMPUTE_DTYPE` has a value that is not allowed. Does not import torch."""
    asked = os.environ.get(COMPUTE_DTYPE)
    if asked and asked not in COMPUTE_DTYPES:
        raise UserError(f"{COMPUTE_DTYPE}: not a compute type ({asked}). Use: {' or '.join(COMPUTE_DTYPES)}")


def compute_bytes_here() -> int:
    """Return the bytes of a number in the compute type of this CPU, as far as that is known without torch: 2 or 4."""
    asked, widest = os.environ.get(COMPUTE_DTYPE), os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    flags = _line_in("/proc/cpuinfo", "flags") + _line_in("/proc/cpuinfo", "Features")
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()) and (
        "BF16" in widest or widest in ("ALL", "DEFAULT")
    )
    return 2 if asked == "bfloat16" or (native and asked != "float32") else 4


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch type without its module, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _compute_dtype_of_cpu() -> torch.dtype:
    import torch

    native = True
    if platform.machine().lower() in ("x86_64", "amd64"):  # where oneDNN also emulates bfloat16 with AVX-512 alone
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    # oneDNN also obeys ONEDNN_MAX_CPU_ISA. Builds without it, such as those for macOS, have no fast bfloat16.
    fast = native and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def give_back_buffers() -> None:
    """Let this process give buffers of 4 MB or more back to the system when they are freed, if it runs on glibc.

    By itself, glibc keeps freed buffers of up to 32 MB, and small ones in between hold their memory.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, 4 << 20)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the size of the main memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that a process may still take on `device`, in bytes, or None if the system does not tell."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def free_host_bytes() -> int | None:
    """Return the main memory that a process may still take, in bytes, or None if the system does not tell."""
    known = [free for free in (_free_in_system(), *_free_in_groups()) if free is not None]
    return min(known, default=None)


def _free_in_system() -> int | None:
    return _bytes_in("/proc/meminfo", "MemAvailable:")


def _bytes_in(path: str, key: str) -> int | None:
    """Return the value behind `key` in a file of the system that counts in kB, in bytes; None without that key."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def _free_in_groups(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield what each memory limit of this process's control group, and of those above it, leaves free, in bytes.

    The page cache counts as used but is given back when needed, so its inactive part is free.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # the first version of control groups
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        while not group.is_dir() and group != base:  # inside a container the path may be the host's
            group = group.parent
        for folder in (group, *(parent for parent in group.parents if base in (parent, *parent.parents))):
            with contextlib.suppress(OSError, ValueError, StopIteration):
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = (folder / "memory.stat").read_text().splitlines()
                idle = next(int(line.split()[1]) for line in stat if line.split()[0] == names[2])
                yield max(limit - used + idle, 0)


def reset_peak_memory() -> None:
    """Reset `peak_memory_bytes`. Systems that cannot do this keep counting from the start of the process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process since the last reset, in bytes."""
    known = _bytes_in("/proc/self/status", "VmHWM:")
    if known is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """Return the name of the processor."""
    name = _line_in("/proc/cpuinfo", "model name").split(":", 1)[-1].strip()
    return name or platform.processor() or platform.machine()


def _line_in(path: str, key: str) -> str:
    """Return the first line of a file of the system that begins with `key`; empty if there is none."""
    with contextlib.suppress(OSError):
        return next((line for line in Path(path).read_text().splitlines() if line.startswith(key)), "")
    return ""
