"""The speed of this machine, measured by `tunepress doctor` and kept for plans.

For some seconds each, a tiny model is trained and run, weights are rounded and a file is written. A plan divides its
sizes by these speeds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.catalog import DEFAULT_VARIANTS, VARIANTS
from pipeline.errors import WorkspaceError
from pipeline.system.files import read_json, write_json
from pipeline.system.hardware import compute_dtype

if TYPE_CHECKING:
    import torch

    from pipeline.quantization.grid import Grid
    from pipeline.quantization.roundings import Rounding

VERSION = 2
LONGEST_SECONDS = 1.5  # for one measurement, which runs at least once
TOKENS = 512
MODEL = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048,
}  # fmt: skip
ROUNDINGS = tuple((name, how) for name in DEFAULT_VARIANTS for how in VARIANTS[name].data_free)
FILE_BYTES = 256_000_000

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Speeds:
    """Measured speeds of one machine, per second.

    Attributes:
        place: the machine's name, as in `planning.devices`.
        train: weights times tokens while an adapter is trained, output head included.
        nf4_weights: weights dequantized from NF4.
        forward: weights of linear layers times tokens while a text is read.
        exact: weights of the output head times tokens in float32, which texts are scored in.
        decode_bytes: bytes of weights read while tokens are generated one by one.
        rounding: bytes of a bf16 model that are rounded, by variant and rounding (`int4/search`).
        nf4_bytes: bytes of a bf16 model that are quantized to NF4 and back, for merging.
        disk_write: bytes written to the disk.
        start_seconds: seconds until a process has imported the libraries of a stage.
    """

    place: str
    train: float
    nf4_weights: float
    forward: float
    exact: float
    decode_bytes: float
    rounding: dict[str, float]
    nf4_bytes: float
    disk_write: float
    start_seconds: float
    version: int = VERSION


def path() -> Path:
    """Return the file of the speeds, in the user's cache folder."""
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "tunepress" / "calibration.json"


def read_speeds() -> Speeds | None:
    """Return the kept speeds; None if they are missing, unreadable or from another version."""
    try:
        found = read_json(path(), {})
    except (WorkspaceError, OSError):
        return None
    known = {field.name for field in fields(Speeds)}
    if not isinstance(found, dict) or found.get("version") != VERSION or found.keys() != known:
        return None
    return Speeds(**found)


def save_speeds(speeds: Speeds) -> None:
    """Save speeds for plans.

    Raises:
        WorkspaceError: if the file cannot be written.
    """
    try:
        write_json(path(), asdict(speeds))
    except OSError as error:
        raise WorkspaceError(
            f"{path()}: cannot be written, so the speeds are not kept ({error.strerror}). "
            "Try: set XDG_CACHE_HOME to another folder"
        ) from None


def measure(place: str, tell: Tell) -> Speeds:
    """Return the speeds of this machine, measured in about twenty seconds.

    Args:
        place: the machine's name.
        tell: receives the name of each measurement when it starts.

    Raises:
        WorkspaceError: if the current folder cannot be written.
    """
    from pipeline.system.libraries import quiet

    tell("the disk")  # first, because it may fail
    disk_write = _disk()
    tell("starting the libraries")
    start = time.perf_counter()
    quiet()
    import torch
    from peft import get_peft_model  # noqa: F401  a stage imports it, so its time counts
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.inference.kernels import quicken

    started = time.perf_counter() - start
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    def build() -> Any:
        model: Any = LlamaForCausalLM(LlamaConfig.from_dict(MODEL))
        return model.to(device, torch.bfloat16)

    model = build().eval().requires_grad_(False)
    weights = sum(m.weight.numel() for n, m in model.named_modules() if _is_linear(n, m))
    ids = torch.randint(0, MODEL["vocab_size"], (1, TOKENS), device=device)
    if device.type == "cpu":
        quicken(model)

    tell("reading a text")
    forward = weights * TOKENS / _seconds(lambda: _forward(model, ids), device)
    head, states = model.lm_head.weight.float(), torch.randn(TOKENS, MODEL["hidden_size"], device=device)
    exact = head.numel() * TOKENS / _seconds(lambda: torch.nn.functional.linear(states, head), device)
    tell("generating a text")
    token = _seconds(lambda: _forward(model, ids[:, :1]), device)
    decode = 2 * (weights + head.numel()) / token
    tell("training")
    trained = _as_trained(build())
    train = (weights + head.numel()) * TOKENS / _seconds(lambda: _step(trained, ids), device)
    tell("NF4")
    nf4, nf4_bytes = _nf4(device)
    tell("rounding")
    rounding = dict(_roundings())
    return Speeds(
        place=place,
        train=train,
        nf4_weights=nf4,
        forward=forward,
        exact=exact,
        decode_bytes=decode,
        rounding=rounding,
        nf4_bytes=nf4_bytes,
        disk_write=disk_write,
        start_seconds=started,
    )


def _is_linear(name: str, module: object) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and name != "lm_head"


def _as_trained(model: Any) -> Any:
    """Return a model with an adapter, computed as in training."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    from pipeline.training.fused_loss import fuse_training_step

    add_fused_lm_head(model)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if model.device.type == "cpu":
        fuse_training_step(adapted, compute_dtype("cpu"))
    return adapted.train()


def _forward(model: Any, ids: torch.Tensor) -> None:
    import torch

    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)


def _step(model: Any, ids: torch.Tensor) -> None:
    import torch

    with torch.autocast(ids.device.type, compute_dtype(ids.device), enabled=ids.device.type != "cpu"):
        loss = model(ids, labels=ids, fused_lm_head=True).loss
    loss.backward()
    model.zero_grad()


def _nf4(device: torch.device) -> tuple[float, float]:
    """Return the weights per second from NF4, and the bytes per second of a bf16 model to NF4 and back."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from pipeline.models.checkpoint.row_blocks import in_parallel
    from pipeline.system.hardware import cores
    from pipeline.training.nf4_base import Nf4Weight

    weight = torch.randn(1024, 2048, dtype=torch.bfloat16)
    codes, state = quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
    back = weight.numel() / _seconds(lambda: dequantize_4bit(codes, state), device)

    def held() -> int:
        Nf4Weight([weight], (1024, 2048)).rows(0, len(weight))
        return weight.nbytes

    jobs = [held] * cores()
    seconds = _seconds(lambda: in_parallel(jobs, 0), torch.device("cpu"))
    return back, len(jobs) * weight.nbytes / seconds


def _roundings() -> Iterator[tuple[str, float]]:
    """Yield `variant/rounding` and the bytes per second of a bf16 model that it rounds."""
    import torch

    from pipeline.config.schema import VariantSpec
    from pipeline.models.checkpoint.row_blocks import in_parallel
    from pipeline.quantization.formats import format_of
    from pipeline.quantization.roundings import rounding
    from pipeline.system.hardware import cores

    rows = torch.randn(256, 2048, dtype=torch.bfloat16) * 0.02

    def job(fill: Rounding, grid: Grid | None) -> int:
        assert grid is not None, "the default variants are stored on a grid"
        fill.round(rows, grid)
        return rows.nbytes

    for name, how in ROUNDINGS:
        spec = VariantSpec(name=name, rounding=how).resolved()
        jobs = [partial(job, rounding(how), format_of(spec).grid(spec, rows.shape[1]))] * cores()
        seconds = _seconds(partial(in_parallel, jobs, 0), torch.device("cpu"))
        yield f"{name}/{how}", len(jobs) * rows.nbytes / seconds


def _disk() -> float:
    """Return the bytes per second written to the disk of the current folder, which holds the runs."""
    block = os.urandom(1 << 22)
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            start, written = time.perf_counter(), 0
            while written < FILE_BYTES and time.perf_counter() - start < LONGEST_SECONDS:
                written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return written / (time.perf_counter() - start)
    except OSError as error:
        raise WorkspaceError(
            f"{os.getcwd()}: cannot be written, so nothing was measured ({error.strerror}). Try: another folder"
        ) from None


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few timed calls, after one call to warm up."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    times: list[float] = []
    begun = time.perf_counter()
    while not times or (len(times) < 5 and time.perf_counter() - begun < LONGEST_SECONDS):
        times.append(timed())
    return min(times)
