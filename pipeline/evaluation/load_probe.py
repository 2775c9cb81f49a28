"""A probe: one loader loads and runs one model in a fresh process, and measures speed and memory.

    python -m pipeline.evaluation.load_probe FOLDER stock|pipeline.load IDS.json OUT auto|cpu|cuda
    python -m pipeline.evaluation.load_probe FILE.gguf llama.cpp IDS.json OUT auto

It writes OUT/probe.json, and OUT/logits.safetensors for the tokens in IDS.json unless the loader is llama.cpp.
The loader `stock` is transformers with torchao alone. For `llama.cpp` torch is not imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import LLAMA_CPP
from pipeline.errors import ModelError
from pipeline.evaluation.model_result import Speed
from pipeline.inference.loaders import STOCK
from pipeline.system.libraries import quiet
from pipeline.system.process_environment import user_environment, with_own_package

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Probe:
    """The result of a probe; `logits` (T, V) float32 are None for llama.cpp and for a model that does not run."""

    figures: Speed
    logits: torch.Tensor | None


def probe(folder: Path, loader: str, ids: Sequence[int] = (), device: str = "auto") -> Probe:
    """Load and run a model in a fresh process.

    Args:
        folder: the model: a folder, or the file of a variant that is one file.
        loader: the key of a loader, as `pipeline.inference.loaders` names it.
        ids: tokens whose logits are returned.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ModelError: if the model does not load.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        ids_path, out = Path(scratch) / "ids.json", Path(scratch)
        ids_path.write_text(json.dumps(list(ids)))
        command = [
            sys.executable,
            "-P",
            "-m",
            "pipeline.evaluation.load_probe",
            str(folder),
            loader,
            str(ids_path),
            str(out),
            device,
        ]
        # The environment of a user, without the allocator settings of stages.
        plain = with_own_package(user_environment())
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=plain)
        result = out / "probe.json"
        if done.returncode < 0:
            raise ModelError(
                f"{folder}: killed while loading (signal {-done.returncode}). Try: free memory, or use a larger machine"
            )
        if done.returncode != 0 or not result.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"{folder}: does not load with the {loader} loader in a fresh process: {last}")
        logits = out / "logits.safetensors"
        figures = Speed.model_validate_json(result.read_text())
        return Probe(figures, load_file(logits)["logits"] if logits.is_file() else None)


def main() -> None:
    """Probe the model that the arguments name."""
    path, loader, ids_path, out, device = sys.argv[1:]
    if loader == LLAMA_CPP:
        figures = _in_llama_cpp(Path(path))
    else:
        figures = _in_transformers(path, loader, json.loads(Path(ids_path).read_text()), Path(out), device)
    (Path(out) / "probe.json").write_text(json.dumps(figures.to_json()))


def _in_llama_cpp(path: Path) -> Speed:
    from pipeline.inference import llama_cpp
    from pipeline.inference.throughput import NEW_TOKENS, PROMPT_TOKENS
    from pipeline.system import hardware

    llama_cpp.library()
    hardware.reset_peak_memory()
    start = time.perf_counter()
    with llama_cpp.opened(path, PROMPT_TOKENS + NEW_TOKENS) as reader:
        seconds = time.perf_counter() - start
        about = {"loader": LLAMA_CPP, "device": "cpu", "load_seconds": seconds, "runs": True, **reader.speed()}
        return Speed.model_validate(about | {"peak_memory_bytes": hardware.peak_memory_bytes()})


def _in_transformers(folder: str, loader: str, tokens: list[int], out: Path, device: str) -> Speed:
    quiet()
    import torch
    from safetensors.torch import save_file

    from pipeline.evaluation.generation import speed
    from pipeline.inference import load
    from pipeline.models.safe_loading import open_model
    from pipeline.system import hardware
    from pipeline.system.libraries import quiet_progress_bars

    quiet_progress_bars()
    device = load.device_named(device).type
    hardware.reset_peak_memory()
    start = time.perf_counter()
    if loader == STOCK:
        model = open_model(Path(folder), dtype="auto", device_map=device if device != "cpu" else None)
    else:
        model, _ = load.load(folder, device=device)
    seconds = time.perf_counter() - start
    ids = torch.tensor([tokens], device=model.device)
    try:
        with torch.no_grad():
            logits = model(ids).logits[0].float().cpu()
    except Exception as error:  # the machine may lack its kernel
        found: dict[str, object] = {
            "runs": False,
            "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        }
    else:
        found = {"runs": True, **speed(model)}
        save_file({"logits": logits.contiguous()}, out / "logits.safetensors")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else hardware.peak_memory_bytes()
    about = {"loader": loader, "device": device, "load_seconds": seconds, "peak_memory_bytes": peak}
    return Speed.model_validate(about | found)


if __name__ == "__main__":
    main()
