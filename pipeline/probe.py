"""One model, one loader, one fresh process: does it load, does it run, how fast, in how much memory?

    python -m pipeline.probe FOLDER stock|pipeline IDS.json OUT

Writes OUT/probe.json, and OUT/logits.safetensors for the tokens in IDS.json. With
`stock` nothing but transformers (and torchao behind it) touches the files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.libraries import quiet
from pipeline.process import with_own_package


@dataclass(frozen=True)
class Probe:
    """What a fresh process found. `logits` (T, V) float32 and the figures are None where it does not run."""

    figures: dict
    logits: object | None

    @property
    def runs(self) -> bool:
        return self.logits is not None


def probe(folder: Path, loader: str, ids: list[int]) -> Probe:
    """Load and run a model in a fresh process.

    Raises:
        ModelError: if it does not even load; a folder that does not load is not published.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        ids_path, out = Path(scratch) / "ids.json", Path(scratch)
        ids_path.write_text(json.dumps(ids))
        command = [sys.executable, "-P", "-m", "pipeline.probe", str(folder), loader, str(ids_path), str(out)]
        # As a user would start it: without the allocator settings that stages run under.
        plain = with_own_package({k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"})
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=plain)
        result = out / "probe.json"
        if done.returncode < 0:
            raise ModelError(
                f"{folder}: killed (signal {-done.returncode}) while it was loaded alone; is memory short?"
            )
        if done.returncode != 0 or not result.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"{folder}: does not load with the {loader} loader in a fresh process: {last}")
        logits = out / "logits.safetensors"
        return Probe(json.loads(result.read_text()), load_file(logits)["logits"] if logits.is_file() else None)


def main() -> None:
    folder, loader, ids_path, out = sys.argv[1:]
    quiet()
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from pipeline import loading, machine, measure
    from pipeline.libraries import quiet_progress_bars

    quiet_progress_bars()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine.reset_peak_memory()
    start = time.perf_counter()
    if loader == "stock":
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map=device if device != "cpu" else None
        )
    else:
        model, _ = loading.load(folder, device=device)
    figures = {"loader": loader, "device": device, "load_seconds": time.perf_counter() - start, "runs": False}
    ids = torch.tensor([json.loads(Path(ids_path).read_text())], device=model.device)
    try:
        with torch.no_grad():
            logits = model(ids).logits[0].float().cpu()
    except Exception as error:  # the kernel that the stock library wants may not exist on this machine
        figures["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        figures |= {"runs": True, **measure.speed(model)}
        save_file({"logits": logits.contiguous()}, Path(out) / "logits.safetensors")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else machine.peak_memory_bytes()
    figures["peak_memory_bytes"] = peak
    (Path(out) / "probe.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
