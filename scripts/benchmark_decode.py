"""How fast models read and write on this CPU: stock loaders, `pipeline.load`, and llama.cpp where it is installed.

    python scripts/benchmark_decode.py [--size 1.1b] [--rounds 3] [--sides bf16,int8] [--json FILE]
    python scripts/benchmark_decode.py --layers        # one layer: kernel against dequantizing, by tokens

With `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` it measures what a CPU without AVX-512 does.

The model is a random Llama that the script makes (weights do not change the speed). Each side
runs in a fresh process; rounds go through all sides in turn, so that what else the machine does
falls on all of them, and the medians over the rounds are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import SIZES, random_checkpoint
from rich.console import Console
from rich.table import Table

SIDES = {
    "bf16": "transformers bf16",
    "float32": "transformers float32",
    "ours-bf16": "pipeline.load bf16",
    "stock-int8": "transformers + torchao int8",
    "int8": "pipeline.load int8",
    "int4": "pipeline.load int4",
    "int8-tables": "pipeline.load int8, embeddings int8",
    "int4-tables": "pipeline.load int4, embeddings int8",
    "Q8_0": "llama.cpp Q8_0",
    "Q4_0": "llama.cpp Q4_0",
}
LLAMA_CPP = ("Q8_0", "Q4_0")
UNQUANTIZED = ("bf16", "float32", "ours-bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens to read")
    parser.add_argument("--new", type=int, default=32, help="tokens to write")
    parser.add_argument("--sides", help=f"some of {','.join(SIDES)}; all that can run otherwise")
    parser.add_argument("--work", type=Path, help="keep the models here, and use those that are there")
    parser.add_argument("--layers", action="store_true", help="measure single layers instead")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, folder = arguments.one
        print(json.dumps(run_one(side, Path(folder), arguments.prompt, arguments.new)))
        return
    rows = layers() if arguments.layers else models(arguments)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def models(arguments: argparse.Namespace) -> list[dict]:
    """One row for each side: medians over the rounds, and ratios to the first side."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.work or Path(scratch)
        sides = arguments.sides.split(",") if arguments.sides else list(SIDES)
        if not arguments.sides and not importlib.util.find_spec("llama_cpp"):
            sides = [side for side in sides if side not in LLAMA_CPP]
        make(folder, arguments.size, sides)
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side in sides:
                lengths = ["--prompt", str(arguments.prompt), "--new", str(arguments.new)]
                command = [sys.executable, __file__, "--one", side, str(folder), *lengths]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for side in sides:
        middle = {key: statistics.median(run[key] for run in runs[side]) for key in runs[side][0]}
        rows.append({"side": SIDES[side], **middle})
    for row in rows:
        for key in ("prefill", "decode"):
            row[f"{key} ratio"] = row[f"{key} tokens/s"] / rows[0][f"{key} tokens/s"]
    return rows


def make(folder: Path, size: str, sides: list[str]) -> None:
    """A random checkpoint of `size`, and what the sides want of it: int8 and int4 by round-to-nearest, GGUF files."""
    from pipeline.system.libraries import quiet

    quiet()
    from pipeline.config.schema import VariantSpec
    from pipeline.models.matrices import linear_weights, table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    if not (folder / "config.json").is_file():
        random_checkpoint(folder, size, shards=1)
    for stored in {folder_of(side) for side in sides if side not in (*UNQUANTIZED, *LLAMA_CPP)}:
        if not (folder / stored / "config.json").is_file():
            name, _, tables = stored.partition("-")
            spec = VariantSpec(name=name, rounding="rtn", embeddings="int8" if tables else "keep").resolved()
            found = table_weights(folder) if tables else {}
            quantize_checkpoint(folder, [spec], {name: folder / stored}, linear_weights(folder), tables=found)
    for kind in set(sides).intersection(LLAMA_CPP):
        if not (folder / f"{kind}.gguf").is_file():
            write_gguf(folder, kind)


def folder_of(side: str) -> str:
    return side.removeprefix("stock-")


def write_gguf(folder: Path, kind: str) -> None:
    """The checkpoint for llama.cpp, without a vocabulary; its norms stay float32, as its converter has it."""
    import gguf
    from gguf.quants import quantize

    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.checkpoint_files import read_config

    config, weights = read_config(folder), Checkpoint(folder)
    writer = gguf.GGUFWriter(folder / f"{kind}.part", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, info in weights.items():
        tensor = weights.read(name).float().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        if len(info.shape) == 1:
            writer.add_tensor(target, tensor)
        else:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(target, quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / f"{kind}.part").rename(folder / f"{kind}.gguf")


def run_one(side: str, folder: Path, prompt: int, new: int) -> dict[str, float]:
    """Tokens per second of one side, and the most memory that its process held."""
    from pipeline.system import hardware

    if side in LLAMA_CPP:
        speed = run_llama_cpp(folder / f"{side}.gguf", prompt, new)
    else:
        from pipeline.system.libraries import quiet

        quiet()
        from pipeline import load
        from pipeline.evaluation.generation import speed as measure_speed
        from pipeline.models.safe_loading import open_model

        place = folder if side in UNQUANTIZED else folder / folder_of(side)
        if side in ("bf16", "float32", "stock-int8"):
            model = open_model(place, dtype="float32" if side == "float32" else "auto")
        else:
            model, _ = load(place, device="cpu")
        speed = measure_speed(model, prompt, new)
        speed = {"prefill": speed["prefill_tokens_per_second"], "decode": speed["decode_tokens_per_second"]}
    figures = {f"{key} tokens/s": value for key, value in speed.items()}
    return {**figures, "peak MB": hardware.peak_memory_bytes() / 1e6}


def run_llama_cpp(path: Path, prompt: int, new: int) -> dict[str, float]:
    """Read and write as `generation.speed` does: one round to warm up, then three."""
    import ctypes

    import llama_cpp

    from pipeline.system.hardware import cores

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = prompt + new, prompt, prompt
    settings.n_threads = settings.n_threads_batch = cores()
    context = llama_cpp.llama_init_from_model(model, settings)

    def decode(tokens: list[int]) -> float:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)  # of which the batch is only a view
        start = time.perf_counter()
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("llama.cpp: decoding failed")
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - start

    prefills, steps = [], []
    for attempt in range(4):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prefill = decode([7] * prompt)
        times = [decode([7]) for _ in range(new)]
        if attempt:
            prefills.append(prefill)
            steps += times
    return {"prefill": prompt / statistics.median(prefills), "decode": 1 / statistics.median(steps)}


def layers() -> list[dict]:
    """For layers of common shapes: from how many tokens dequantizing is faster than the kernel. Least of ten, in ms."""
    from pipeline.system.libraries import quiet

    quiet()
    import torch

    from pipeline.inference.kernels import cpu
    from pipeline.inference.kernels.products import FEW_ROWS, many_rows, product_dtype
    from pipeline.quantization.formats.torchao.format import INT8
    from pipeline.quantization.grid import Grid
    from pipeline.quantization.roundings import rounding

    def least(function, x) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            function(x)
            times.append(time.perf_counter() - start)
        return min(times) * 1e3

    rows = []
    torch.set_grad_enabled(False)
    for shape in ((2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096)):
        weight = torch.randn(shape).bfloat16()
        plain = torch.nn.Linear(*shape[::-1], bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        sizes = [torch.randn(tokens, shape[1]).bfloat16() for tokens in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512)]
        for x in sizes if product_dtype(torch.bfloat16) == torch.float32 else ():
            row = {"shape": f"{shape[0]}x{shape[1]}", "bits": 16, "group": "", "tokens": len(x)}
            few, many = least(plain, x), least(lambda x, weight=weight: many_rows(x, weight), x)
            row |= {"bf16": few, "kernel": few, "dequantize": many}
            rows.append({**row, "taken": "kernel" if len(x) <= FEW_ROWS else "dequantize"})
        for grid in (INT8, Grid(8, 64, "none", torch.float32), Grid(4, 64, "float", torch.bfloat16)):
            layer = cpu.linear(rounding("rtn").round(weight, grid), None)
            for x in sizes:
                row = {"shape": f"{shape[0]}x{shape[1]}", "bits": grid.bits, "group": grid.group_size or "row"}
                row["tokens"] = len(x)
                row |= {"bf16": least(plain, x), "kernel": least(layer._few, x), "dequantize": least(layer._many, x)}
                rows.append({**row, "taken": "kernel" if len(x) <= layer.kernel_tokens else "dequantize"})
    return rows


if __name__ == "__main__":
    main()
