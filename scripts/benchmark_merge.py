"""Merging a LoRA adapter into a random checkpoint: wall time and peak memory, beside peft.

    python scripts/benchmark_merge.py [--size 1.1b] [--shards 5] [--rank 16] [--times 3] [--json FILE]

Both sides run in fresh processes, from their start to their end, imports included. peft loads in bf16,
calls merge_and_unload and saves. The base has been read before, so it comes from the page cache.
`--nf4` also merges into the base as NF4 training held it, which peft has no counterpart of.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import SIZES, medians, random_checkpoint, report, run

# Factors for every linear layer, as peft would write them; the model itself is never made.
ADAPTER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipeline.models import linear_weights

base, folder, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
factors = {}
for name, (rows, width) in linear_weights(base).items():
    module = "base_model.model." + name.removesuffix(".weight")
    factors[f"{module}.lora_A.weight"] = torch.randn(rank, width) * 0.02
    factors[f"{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
folder.mkdir()
save_file(factors, folder / "adapter_model.safetensors")
targets = sorted({name.split(".")[-2] for name in linear_weights(base)})
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""
OURS = """
import sys
from pathlib import Path
from pipeline.libraries import quiet
quiet()
from pipeline.merging import merge_checkpoint
from pipeline.models import linear_weights

base, adapter, output, kind = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
merge_checkpoint(base, adapter, output, kind, linear_weights(base))
"""
PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--nf4", action="store_true", help="also merge into the NF4 base")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints; the system's if not given")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        base = random_checkpoint(Path(scratch) / "model", arguments.size, arguments.shards)
        adapter = Path(scratch) / "adapter"
        run([sys.executable, "-c", ADAPTER, str(base), str(adapter), str(arguments.rank)])
        sides = {
            "tunepress bf16": partial(merge, OURS, base, adapter, "bf16"),
            "peft": partial(merge, PEFT, base, adapter),
        }
        if arguments.nf4:
            sides["tunepress nf4"] = partial(merge, OURS, base, adapter, "nf4")
        rows = medians(sides, arguments.times)
    seconds = {row["side"]: row["seconds"] for row in rows}
    ratios = {f"{side} / peft": s / seconds["peft"] for side, s in seconds.items() if side != "peft"}
    report(f"merging rank {arguments.rank} into {arguments.size}", rows, ratios, arguments.json)


def merge(code: str, base: Path, adapter: Path, *options: str) -> dict[str, float]:
    """Run one side into a folder that is gone afterwards."""
    output = base.parent / "output"
    try:
        return run([sys.executable, "-c", code, str(base), str(adapter), str(output), *options])
    finally:
        shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
