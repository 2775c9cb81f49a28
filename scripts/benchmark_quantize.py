"""Quantizing a random checkpoint: wall time and peak memory, beside transformers with torchao and mlx-lm.

    python scripts/benchmark_quantize.py [--size 1.1b] [--shards 5] [--times 3] [--json FILE]
                                         [--variants int8,int4] [--roundings rtn,hqq,search]
                                         [--mlx PYTHON] [--peers none]

Every side runs in a fresh process, from its start to its end, imports included. Ours makes all its
variants in one pass. mlx-lm makes one at a time, and is measured where it is installed: in this Python, or
in the one that --mlx names. The checkpoint has been read before, so it comes from the page cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import AS_STAGES, SIZES, medians, random_checkpoint, report, run

OURS = """
import sys
from pathlib import Path
from pipeline.system.libraries import quiet
quiet()
from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.writer import quantize_checkpoint

source, output, rounding, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4].split(",")
takes = {name: VARIANTS[name].bits < 8 and rounding in VARIANTS[name].roundings for name in names}
specs = [VariantSpec(name=name, rounding=rounding if takes[name] else None).resolved() for name in names]
tables = table_weights(source) if any(spec.embeddings == "int8" for spec in specs) else None
quantize_checkpoint(source, specs, {s.name: output / s.name for s in specs}, linear_weights(source), tables=tables)
"""
TORCHAO = """
import sys
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

quantization = TorchAoConfig(Int8WeightOnlyConfig())
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype="auto", quantization_config=quantization, trust_remote_code=False, use_safetensors=True
)
model.save_pretrained(sys.argv[2])
"""
MLX = """
import sys
from mlx_lm import convert

convert(sys.argv[1], mlx_path=sys.argv[2], quantize=True, q_bits=int(sys.argv[3]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--variants", default="int8,int4", help="what ours makes")
    parser.add_argument("--roundings", default="rtn,hqq,search", help="of less than 8 bits")
    parser.add_argument("--mlx", help="a Python in which mlx-lm is installed")
    parser.add_argument("--peers", default="torchao,mlx")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints; the system's if not given")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    mlx = arguments.mlx or (sys.executable if importlib.util.find_spec("mlx_lm") else None)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source = random_checkpoint(Path(scratch) / "model", arguments.size, arguments.shards)
        sides = {}
        for rounding in arguments.roundings.split(","):
            name = f"tunepress {arguments.variants.replace(',', '+')} {rounding}"
            sides[name] = partial(make, sys.executable, OURS, source, rounding, arguments.variants)
        if "torchao" in arguments.peers:
            sides["transformers+torchao int8"] = partial(make, sys.executable, TORCHAO, source)
        if "mlx" in arguments.peers and mlx:
            for bits in ("8", "4"):
                sides[f"mlx-lm {bits} bit"] = partial(make, mlx, MLX, source, bits)
        rows = medians(sides, arguments.times)
    report(f"quantizing {arguments.size}, {arguments.shards} shards", rows, ratios(rows), arguments.json)


def make(python: str, code: str, source: Path, *options: str) -> dict[str, float]:
    """Run one side into a folder that is gone afterwards."""
    output = source.parent / "output"
    try:
        return run([python, "-c", code, str(source), str(output), *options], AS_STAGES if code is OURS else None)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def ratios(rows: list[dict]) -> dict[str, float]:
    """Our wall time by that of each peer; mlx-lm's is that of both its conversions together."""
    seconds = {row["side"]: row["seconds"] for row in rows}
    mlx = sum(s for side, s in seconds.items() if side.startswith("mlx-lm"))
    peers = {"mlx-lm 8 + 4 bit": mlx, "transformers+torchao int8": seconds.get("transformers+torchao int8", 0)}
    ours = {side: s for side, s in seconds.items() if side.startswith("tunepress")}
    return {f"{side} / {peer}": s / p for side, s in ours.items() for peer, p in peers.items() if p}


if __name__ == "__main__":
    main()
