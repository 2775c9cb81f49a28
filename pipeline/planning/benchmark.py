"""How fast this machine is, measured by `tunepress doctor` and kept for plans.

A tiny model of ordinary shape is trained and run, weights are rounded, a file is written: some seconds of each of
the things that stages spend their time on. Times of a plan are these figures times its sizes.
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
LONGEST = 1.5  # seconds that one thing is measured for, at least once
TOKENS = 512
MODEL = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048,
}  # fmt: skip
ROUNDINGS = tuple((name, how) for name in DEFAULT_VARIANTS for how in VARIANTS[name].roundings)
FILE_BYTES = 256_000_000

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """Figures of one machine.

    Attributes:
        place: what they were measured on, as `planning.devices` names it.
        train: weights times tokens a second of training an adapter, with those of the output head.
        nf4_weights: weights a second that come back from NF4.
        forward: weights of linear layers times tokens a second of reading a text.
        exact: the same of the output head, in float32, as texts are scored with.
        decode_bytes: bytes of weights a second of writing, token by token.
        rounding: bytes a second of a bf16 model that become `int4/search` and its like.
        nf4_bytes: bytes a second of a bf16 model that become NF4 and come back, for merging.
        disk_write: bytes a second that reach the disk.
        start_seconds: until a process has imported what a stage needs.
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

    def is_of(self, place: str) -> bool:
        return self.place == place


def path() -> Path:
    """Where the figures are kept: the user's cache folder on this platform."""
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "tunepress" / "calibration.json"


def read_calibration() -> Calibration | None:
    """What was kept, if it can be read and is of this version; anything else is measured anew."""
    try:
        found = read_json(path(), {})
    except (WorkspaceError, OSError):
        return None
    known = {field.name for field in fields(Calibration)}
    if not isinstance(found, dict) or found.get("version") != VERSION or found.keys() != known:
        return None
    return Calibration(**found)


def keep(calibration: Calibration) -> None:
    """Keep figures for plans.

    Raises:
        WorkspaceError: where they cannot be written.
    """
    try:
        write_json(path(), asdict(calibration))
    except OSError as error:
        raise WorkspaceError(
            f"the figures are not kept: {path()} cannot be written ({error.strerror}); XDG_CACHE_HOME says where to"
        ) from None


def measure(place: str, tell: Tell = lambda what: None) -> Calibration:
    """Measure this machine, in some twenty seconds.

    Args:
        place: its name.
        tell: is told what is being measured.

    Raises:
        WorkspaceError: where nothing can be written in the folder that one stands in.
    """
    from pipeline.system.libraries import quiet

    tell("the disk")  # first, for it may be that it cannot be
    disk_write = _disk()
    tell("starting the libraries")
    start = time.perf_counter()
    quiet()
    import torch
    from peft import get_peft_model  # noqa: F401  of what a stage imports
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
    tell("writing one")
    token = _seconds(lambda: _forward(model, ids[:, :1]), device)
    decode = 2 * (weights + head.numel()) / token
    tell("training")
    trained = _as_trained(build())
    train = (weights + head.numel()) * TOKENS / _seconds(lambda: _step(trained, ids), device)
    tell("NF4")
    nf4, nf4_bytes = _nf4(device)
    tell("rounding")
    rounding = dict(_roundings())
    return Calibration(
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


def _as_trained(model):
    """Return a model with an adapter that multiplies as training has it."""
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
    """Weights a second that come back from NF4, and bytes a second of a bf16 model that go there and back."""
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
    import torch

    from pipeline.config.schema import VariantSpec
    from pipeline.models.checkpoint.row_blocks import in_parallel
    from pipeline.quantization.formats import format_of
    from pipeline.quantization.roundings import rounding
    from pipeline.system.hardware import cores

    rows = torch.randn(256, 2048, dtype=torch.bfloat16) * 0.02

    def job(fill: Rounding, grid: Grid) -> int:
        fill(rows, grid)
        return rows.nbytes

    for name, how in ROUNDINGS:
        spec = VariantSpec(name=name, rounding=how).resolved()
        grid, fill = format_of(spec).grid(spec, rows.shape[1]), rounding(how).round

        jobs = [partial(job, fill, grid)] * cores()
        seconds = _seconds(partial(in_parallel, jobs, 0), torch.device("cpu"))
        yield f"{name}/{how}", len(jobs) * rows.nbytes / seconds


def _disk() -> float:
    """Bytes a second that reach the disk under the folder that one stands in, where runs are."""
    block = os.urandom(1 << 22)
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            start, written = time.perf_counter(), 0
            while written < FILE_BYTES and time.perf_counter() - start < LONGEST:
                written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return written / (time.perf_counter() - start)
    except OSError as error:
        raise WorkspaceError(
            f"not measured: the folder that you stand in cannot be written ({error.strerror}); go to where runs may be"
        ) from None


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time that some work takes, of a few after one to warm up."""
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
    while not times or (len(times) < 5 and time.perf_counter() - begun < LONGEST):
        times.append(timed())
    return min(times)
