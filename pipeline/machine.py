"""What this machine has, and what a process used of it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Of the free memory, what a model's weights may take; the rest is for activations, logits, and what loading needs.
WEIGHTS_SHARE = 0.75


def describe() -> dict[str, str | int | None]:
    """The machine in the words that a card uses beside its figures; imports torch."""
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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory in all, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take on `device`, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def free_host_bytes() -> int | None:
    """Main memory that a process may still take, in bytes; None where the system does not tell."""
    known = [free for free in (_free_in_system(), *_free_in_groups()) if free is not None]
    return min(known, default=None)


def _free_in_system() -> int | None:
    return _bytes_in("/proc/meminfo", "MemAvailable:")


def _bytes_in(path: str, key: str) -> int | None:
    """What a file of the system, in kB, says behind `key`; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def _free_in_groups(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What is left of every limit that a container or a job sets: of this process's control group, and those above.

    A group's page cache counts as used and is given back when needed, so the part of it that lies idle is free.
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
    """Begin `peak_memory_bytes` anew; on systems that cannot, it goes on from the process's start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The most memory that this process held since the last reset: resident, in bytes."""
    known = _bytes_in("/proc/self/status", "VmHWM:")
    if known is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The processor, as its maker calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
