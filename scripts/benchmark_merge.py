"""Merging a LoRA adapter into a random checkpoint: wall time and peak memory, beside peft.

    python scripts/benchmark_merge.py [--size 1.1b] [--shards 5] [--rank 16] [--times 3] [--json FILE]
                                      [--nf4] [--variants] [--rounding rtn] [--peers none]

Both sides run in fresh processes, from their start to their end, imports included. peft loads in bf16,
calls merge_and_unload and saves. The base has been read before, so it comes from the page cache.
`--nf4` also merges into the base as NF4 training held it, which peft has no counterpart of.
`--variants` also makes int8 and int4 of the result: in the merge's own pass, and in a second one, which
is a process of its own as it is in a run; its time is then added, and the higher of both peaks is told.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmark_quantize import OURS as QUANTIZE
from benchmarks import AS_STAGES, SIZES, medians, random_checkpoint, report, run

# Factors for every linear layer, as peft would write them; the model itself is never made.
ADAPTER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipeline.models.matrices import linear_weights

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
from pipeline.system.libraries import quiet
quiet()
from pipeline.training.merge import merge_checkpoint
from pipeline.models.matrices import linear_weights

base, adapter, output, kind = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
linear = linear_weights(base)
variants = None
if rounding := sys.argv[5:]:
    from pipeline.config.schema import VariantSpec
    from pipeline.quantization.writer import Variants

    specs = [VariantSpec(name="int8").resolved(), VariantSpec(name="int4", rounding=rounding[0]).resolved()]
    variants = Variants(specs, {s.name: output / s.name for s in specs}, linear)
merge_checkpoint(base, adapter, output, kind, linear, variants=variants)
"""
PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--nf4", action="store_true", help="also merge into the NF4 base")
    parser.add_argument(
        "--variants", action="store_true", help="also merge and make int8 and int4, in one pass and in two"
    )
    parser.add_argument("--rounding", default="rtn", help="of int4, with --variants")
    parser.add_argument("--peers", default="peft")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints; the system's if not given")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        base = random_checkpoint(Path(scratch) / "model", arguments.size, arguments.shards)
        adapter = Path(scratch) / "adapter"
        run([sys.executable, "-c", ADAPTER, str(base), str(adapter), str(arguments.rank)])
        kinds = ("bf16", "nf4") if arguments.nf4 else ("bf16",)
        sides = {f"tunepress {kind}": partial(merge, OURS, base, adapter, kind) for kind in kinds}
        if "peft" in arguments.peers:
            sides["peft"] = partial(merge, PEFT, base, adapter)
        if arguments.variants:
            for kind in kinds:
                what = f"{kind}, int8 and int4"
                sides[f"{what} in one pass"] = partial(merge, OURS, base, adapter, kind, arguments.rounding)
                sides[f"{what} in two"] = partial(merge_then_quantize, base, adapter, kind, arguments.rounding)
        rows = medians(sides, arguments.times)
    report(f"merging rank {arguments.rank} into {arguments.size}", rows, ratios(rows), arguments.json)


def merge(code: str, base: Path, adapter: Path, *options: str) -> dict[str, float]:
    """Run one side into a folder that is gone afterwards."""
    output = base.parent / "output"
    try:
        command = [sys.executable, "-c", code, str(base), str(adapter), str(output), *options]
        return run(command, AS_STAGES if code is OURS else None)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def merge_then_quantize(base: Path, adapter: Path, kind: str, rounding: str) -> dict[str, float]:
    """The merge, and then a process that reads what was merged for its variants."""
    output = base.parent / "output"
    try:
        first = run([sys.executable, "-c", OURS, str(base), str(adapter), str(output), kind], AS_STAGES)
        second = run([sys.executable, "-c", QUANTIZE, str(output), str(output), rounding], AS_STAGES)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return {key: (max if key == "peak_bytes" else sum)((first[key], second[key])) for key in first if key != "output"}


def ratios(rows: list[dict]) -> dict[str, float]:
    """Our wall time by peft's for the merge alone, and that of one pass by that of two."""
    seconds = {row["side"]: row["seconds"] for row in rows}
    found = {}
    for side, wall in seconds.items():
        if side.startswith("tunepress") and "peft" in seconds:
            found[f"{side} / peft"] = wall / seconds["peft"]
        if (other := side.replace("one pass", "two")) != side:
            found[f"{side} / in two"] = wall / seconds[other]
    return found


if __name__ == "__main__":
    main()
