"""What the benchmarks share: random checkpoints of a chosen size, and sides that run in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.system.process_environment import STAGE_SETTINGS

AS_STAGES = STAGE_SETTINGS  # what `tunepress` itself starts its work with
ROOT = Path(__file__).parents[1]
# Widths of a tiny and a small model for trying things out, SmolLM2-135M, TinyLlama-1.1B and Llama-3-8B.
SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 2000},
    "50m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 32000},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 32000},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip

# Runs in a process of its own: this one stays small, and a child's peak memory begins at its parent's.
_MAKE = """
import sys
from pathlib import Path
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from pipeline.models.checkpoint import CheckpointWriter
import json

folder, settings, shards = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
config = LlamaConfig(**settings, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])
with torch.device("meta"):
    model = LlamaForCausalLM(config)
shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
total = sum(2 * parameter.numel() for parameter in model.parameters())
noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
plan = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
with CheckpointWriter(folder, plan, shard_bytes=-(-total // shards) if shards > 1 else total) as writer:
    for name, shape in shapes.items():
        width = shape[1] if len(shape) == 2 else 1
        step = len(noise) // width
        for first in range(0, shape[0], step):
            rows = min(step, shape[0] - first)
            block = noise[: rows * width].view(rows, *shape[1:])
            writer.write(name, block if len(shape) == 2 else torch.ones_like(block), first)
config.save_pretrained(folder)
words = {"<s>": 0, "</s>": 1, **{chr(i): i - 30 for i in range(32, 127)}}
tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
"""


def random_checkpoint(folder: Path, size: str, shards: int) -> Path:
    """A Llama of that size in bf16, random, with a tokenizer; in so many shards, or one more."""
    run([sys.executable, "-c", _MAKE, str(folder), json.dumps(SIZES[size]), str(shards)])
    return folder


def run(command: list[str], settings: dict[str, str] | None = None) -> dict:
    """Run a command to its end; its wall and processor time in seconds from start to exit, peak memory, and output.

    Args:
        settings: environment variables on top of those of all sides.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= settings or {}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\n{output.decode(errors='replace')[-3000:]}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,  # which says more where others use the machine
        "peak_bytes": usage.ru_maxrss * 1024,
        "output": output.decode(errors="replace"),
    }


def medians(sides: dict[str, Callable[[], dict[str, float]]], times: int) -> list[dict]:
    """Every side so many times, taking turns; a row for each, with the medians and every time."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(times):
        for name, side in sides.items():
            os.sync()  # or one side waits for the disk on another's account
            seen[name].append(side())
    return [
        {
            "side": name,
            **{key: statistics.median(r[key] for r in results) for key in results[0] if key != "output"},
            "all_seconds": [round(r["seconds"], 2) for r in results],
        }
        for name, results in seen.items()
    ]


def report(title: str, rows: list[dict], ratios: dict[str, float], path: Path | None) -> None:
    """Print the table and the ratios; write them where asked."""
    table = Table("side", "wall s", "cpu s", "peak MB", "every wall s", title=title)
    for row in rows:
        times = " ".join(f"{s:.1f}" for s in row["all_seconds"])
        figures = (f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}")
        table.add_row(row["side"], *figures, times)
    console = Console()
    console.print(table)
    for name, value in ratios.items():
        console.print(f"{name}: {value:.2f}")
    if path:
        path.write_text(json.dumps({"title": title, "rows": rows, "ratios": ratios}, indent=2) + "\n")
