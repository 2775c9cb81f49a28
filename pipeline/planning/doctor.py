"""The doctor's report: devices, kernels, variants that run, versions, disk, login and speed of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import DEFAULT_VARIANTS, NEAREST, VARIANTS
from pipeline.config.engines import CPU, CUDA, ENGINES, FP8_CAPABILITY, GPU, TRANSFORMERS, TUNEPRESS, Runs
from pipeline.errors import HubError, WorkspaceError, redact
from pipeline.planning.benchmark import Speeds, path, read_speeds, save_speeds
from pipeline.planning.benchmark_process import measure_in_time
from pipeline.planning.devices import hub_cache, nearest_folder, this_machine
from pipeline.system import command_names, hardware
from pipeline.system.libraries import EXTRAS, OURS, is_installed, lacking, quiet, versions
from pipeline.system.text_format import size
from pipeline.tracking.trackers import TRACKERS, tracker

if TYPE_CHECKING:
    from rich.console import Console

# AMD GPUs without kernels in torch's builds, and the version whose kernels they run: gfx1031 runs those of gfx1030.
AS_OTHERS = {"gfx103": "10.3.0", "gfx110": "11.0.0"}
BUILT_FOR = ("gfx1030", "gfx1100", "gfx1101", "gfx1102")


def examine(runs: Path, calibrate: bool | None = None, tell: Callable[[str], None] = lambda what: None) -> dict:
    """Return the whole report as plain data, without any token.

    Args:
        runs: the folder of the runs, for its free space.
        calibrate: True to measure the speed; None to measure it once on each machine.
        tell: receives the name of each measurement when it starts.
    """
    quiet()
    here = this_machine(runs)
    known, problem, found = read_speeds(), None, devices()
    if calibrate or (calibrate is None and (known is None or known.place != here.name)):
        known, problem = _measured(here.name, tell)
    return {
        "machine": hardware.describe(),
        "memory_free_bytes": here.host_bytes,
        "compute_dtype": hardware.dtype_name(hardware.compute_dtype("cuda" if here.has_gpu else "cpu")),
        "devices": found,
        "float8": float8(found),
        "kernels": kernels(),
        "runs": runs_on(found),
        "versions": {"python": platform.python_version(), **versions(), **versions(*OURS)},
        "extras": {name: all(map(is_installed, needs)) for name, needs in _extras().items()},
        "disk": _disk(runs),
        "hub": login(),
        **{name: tracker(name).state() for name in TRACKERS},
        "calibration": {
            "file": str(path()),
            "figures": known and asdict(known),
            "is_of_here": known is not None and known.place == here.name,
            "problem": problem,
        },
    }


def _extras() -> dict[str, tuple[str, ...]]:
    """Return the modules of each extra, also of those that trackers need."""
    pairs = [pair for name in TRACKERS for pair in tracker(name).REQUIRES]
    return EXTRAS | {extra: tuple(module for module, of in pairs if of == extra) for _, extra in pairs}


def _measured(place: str, tell: Callable[[str], None]) -> tuple[Speeds | None, str | None]:
    """Return new speeds, and the problem if they could not be measured or saved."""
    speeds = None
    try:
        speeds = measure_in_time(place, tell)
        save_speeds(speeds)
    except WorkspaceError as error:
        return speeds, str(error)
    return speeds, None


def devices() -> list[dict]:
    """Return the devices that torch finds, the one for stages first, with advice for an unused GPU."""
    import torch

    found = []
    if torch.cuda.is_available():
        kind = "rocm" if torch.version.hip else "cuda"
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            device = {"kind": kind, "name": about.name, "memory_bytes": about.total_memory}
            if kind == "cuda":
                device["capability"] = f"{about.major}.{about.minor}"
            else:
                device |= {"architecture": about.gcnArchName, "advice": rocm_advice(about.gcnArchName)}
            found.append(device)
    elif advice := missing_gpu():
        found.append({"kind": "unused", "name": "a GPU that torch does not use", "advice": advice})
    if torch.backends.mps.is_available():
        found.append({"kind": "mps", "name": "Apple GPU", "advice": "for chat only"})
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = {"kind": "cpu", "name": hardware.describe()["cpu"], "capability": capability, "cores": hardware.cores()}
    return [*found, cpu]


def missing_gpu(root: Path = Path("/")) -> str | None:
    """Return what to do if there is a GPU driver but torch finds no GPU; None without a driver."""
    build = importlib.metadata.version("torch")
    if (root / "dev/kfd").exists():
        if "rocm" not in build:
            return f"AMD GPU: torch {build} is not built for it. Try: install a ROCm build of PyTorch"
        if not os.access(root / "dev/kfd", os.R_OK | os.W_OK):
            return "AMD GPU: no permission to open it. Try: join the groups render and video, and log in again"
        return "AMD GPU: torch does not find it. Try: rocminfo"
    if (root / "dev/nvidiactl").exists():
        if "+cpu" in build:
            return f"NVIDIA GPU: torch {build} is not built for it. Try: install a CUDA build of PyTorch"
        return "NVIDIA GPU: torch does not find it, perhaps because the driver is too old. Try: nvidia-smi"
    if (root / "opt/rocm").is_dir():
        return "ROCm: no /dev/kfd. Try: load the amdgpu driver, or pass that device to the container"
    return None


def rocm_advice(architecture: str) -> str | None:
    """Return what to set for an AMD GPU that torch finds; None if nothing must be set."""
    name = architecture.split(":")[0]
    version = next((v for prefix, v in AS_OTHERS.items() if name.startswith(prefix)), None)
    if version is None or name in BUILT_FOR or os.environ.get("HSA_OVERRIDE_GFX_VERSION"):
        return None
    return f"{name}: torch has no kernels for it. Try: set HSA_OVERRIDE_GFX_VERSION={version}"


def kernels() -> dict[str, str]:
    """Return the layer of each kind of quantized weight on the device that stages use."""
    import torch

    from pipeline.inference.kernels import linear, runs_as_stored
    from pipeline.quantization.formats.torchao.format import INT8, grouped
    from pipeline.quantization.roundings import rounding

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    eight, four = DEFAULT_VARIANTS
    for name, grid in ((eight, INT8), (f"{eight}, in groups", grouped(8, 64)), (four, grouped(4, 64))):
        weight = rounding(NEAREST).round(torch.ones(64, 1024, dtype=torch.bfloat16), grid)
        layer = None if runs_as_stored(weight, device) else linear(weight, None, device)
        stored = "as stored, on torchao's kernel" if runs_as_stored(weight, device) else "dequantized, without a kernel"
        found[name] = stored if layer is None else type(layer).__name__
    return found


def float8(devices: list[dict]) -> dict:
    """Return whether a device has kernels for float8, and the capability that they need."""
    return {"available": _capability(devices) >= FP8_CAPABILITY, "needs_capability": str(FP8_CAPABILITY)}


def runs_on(devices: list[dict]) -> dict[str, list[str]]:
    """Return the variants that each engine runs on these devices: key of the engine -> names.

    Servers are not asked whether they are installed. For transformers and `pipeline.load`, packages must be.
    """
    kinds, capability = {device["kind"] for device in devices}, _capability(devices)
    there = {CPU, *([CUDA] if "cuda" in kinds else []), *([GPU] if kinds & {"cuda", "rocm", "mps"} else [])}

    def runs_here(way: Runs) -> bool:
        ours = way.engine in (TRANSFORMERS, TUNEPRESS)
        fits = way.hardware in there and (way.hardware != CUDA or way.capability <= capability)
        return way.computes and fits and not (ours and lacking(way.packages))

    found = {
        engine: [
            f"{name} ({packing})" if packing else name
            for name, variant in VARIANTS.items()
            for packing in (None, *list(variant.packings)[1:])
            if any(way.engine == engine and runs_here(way) for way in variant.ways(packing))
        ]
        for engine in ENGINES
    }
    return {engine: names for engine, names in found.items() if names}


def _capability(devices: list[dict]) -> float:
    """Return the highest CUDA compute capability of these devices; 0 without one."""
    return max((float(device["capability"]) for device in devices if device["kind"] == "cuda"), default=0.0)


def login() -> dict:
    """Return the Hub user and whether the token may write, or the problem in one line."""
    from huggingface_hub import get_token

    from pipeline.hub.auth import may_write, who_is

    token = get_token()
    if token is None:
        return {"name": None, "may_write": False, "problem": f"no token. Try: set HF_TOKEN, or {command_names.login()}"}
    try:
        who = who_is("the Hub", token)
    except HubError as error:
        return {"name": None, "may_write": None, "problem": str(error)}
    except Exception as error:  # the transport has many errors for a missing network
        reason = redact(" ".join(str(error).split()))[:200] or type(error).__name__
        return {"name": None, "may_write": None, "problem": f"the Hub could not be reached ({reason})"}
    about = who.get("auth", {}).get("accessToken", {})
    return {"name": who.get("name"), "may_write": may_write(about), "role": about.get("role"), "problem": None}


def _disk(runs: Path) -> dict[str, dict]:
    places = {"runs": runs.absolute(), "hub_cache": hub_cache()}
    return {
        name: {"folder": str(p), "free_bytes": shutil.disk_usage(nearest_folder(p)).free} for name, p in places.items()
    }


def show(console: Console, found: dict) -> None:
    """Print the report as a page of text."""
    from rich.markup import escape

    for label, line in _lines(found):
        console.print(f"[bold]{label:<11}[/] {escape(line)}")


def _lines(found: dict) -> Iterator[tuple[str, str]]:
    about, hub, kept = found["machine"], found["hub"], found["calibration"]
    yield "System", f"{about['system']}, {about['cores']} cores, {size(found['memory_free_bytes'])} of memory free"
    for device in found["devices"]:
        known = (device.get("capability"), device.get("architecture"))
        more = ", ".join(filter(None, (*known, size(device["memory_bytes"]) if "memory_bytes" in device else None)))
        yield "Device", f"{device['kind']}: {device['name']}{f' ({more})' if more else ''}"
        if device.get("advice"):
            yield "", f"  {device['advice']}"
    yield "Compute", _compute(found["compute_dtype"])
    for grid, layer in found["kernels"].items():
        yield "Kernel", f"{grid}: {layer}"
    eight = found["float8"]
    lacking = (
        f"stored only, and computed in {found['compute_dtype']}: its kernels need a CUDA card of compute capability "
        f"{eight['needs_capability']} or higher"
    )
    yield "Float8", "available" if eight["available"] else lacking
    for engine, names in found["runs"].items():
        yield "Runs", f"{ENGINES[engine].label.strip('`')}: {', '.join(names)}"
    yield "Versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield "Extras", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found["extras"].items())
    for name, place in found["disk"].items():
        yield "Disk", f"{name.replace('_', ' ')}: {size(place['free_bytes'])} free in {place['folder']}"
    granted = " to what it is granted" if hub.get("role") == "fineGrained" else ""
    writes = f"may write{granted}" if hub.get("may_write") else "may only read"
    yield "Hub", hub["problem"] or f"{hub['name']}; the token {writes}"
    for name in TRACKERS:
        yield tracker(name).LABEL, found[name]["folder"]
    yield "Speed", _speed(kept)


def _compute(dtype: str) -> str:
    """Return the compute type, with the reason if it is not bfloat16."""
    if os.environ.get(hardware.COMPUTE_DTYPE):
        return f"{dtype} for products of many rows, set by {hardware.COMPUTE_DTYPE}"
    slow = " for products of many rows; bfloat16 has no fast instructions here"
    return dtype if dtype == "bfloat16" else dtype + slow


def _speed(kept: dict) -> str:
    figures = kept["figures"]
    if not figures:
        return kept["problem"] or f"not measured. Try: {command_names.command('doctor', '--calibrate')}"
    told = (
        f"training {figures['train'] / 1e9:.3g}, reading {figures['forward'] / 1e9:.3g} G weights x tokens/s; "
        f"decoding {size(figures['decode_bytes'])}/s; int4 {size(figures['rounding']['int4/search'])}/s; "
        f"disk {size(figures['disk_write'])}/s"
    )
    if kept["problem"]:
        return f"{told}; {kept['problem']}"
    return f"{told}, kept in {kept['file']}" + (
        "" if kept["is_of_here"] else "; measured on another machine. Try: doctor --calibrate"
    )
