"""What training with quantization (QAT) recovers of the loss that quantizing costs, at the same size and steps.

    python scripts/benchmark_qat.py [MODEL] [--variant int4] [--steps 60] [--tokens 16384] [--qualities fast,calibrated]
                                    [--set KEY=VALUE] [--output DIR]

The demo's training is run twice with the same data, seed and steps: without `train.qat`, and with it. The variant of
the first is made once for each of `--qualities`: rounded to nearest, or calibrated, or with trained scales as well. All
models are measured on the same held-out tokens, through their own files. Differences are paired, token by token, and
their errors are those between examples. The share that is recovered is 1 - (loss of a model above the fine-tuned model
in bf16) / (loss of the first variant above it), if the latter is beyond two errors. The seconds of a training step are
those of this run, held-out measurements included.

MODEL is a Hub id or a folder; by default it is the embedded SmolLM2-135M-Instruct, off the grid that it was packed on
(`scripts/benchmark_accuracy.py` says why). The results are qat.json in `--output`. Run the same command again to
continue a stopped benchmark.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_accuracy import EMBEDDED, REORDERED, check_grid
from rich.console import Console
from rich.table import Table

from pipeline.cli.exit_codes import plain_errors
from pipeline.config.calibration import FAST_QUALITY, QUALITIES
from pipeline.config.catalog import NEAREST
from pipeline.config.loader import load_config
from pipeline.system.files import write_json

if TYPE_CHECKING:
    from pipeline.config.schema import TrainingRun
    from pipeline.evaluation.metrics import Scores
    from pipeline.workflow.workspace import Workspace

WHOLE, TRAINED = "fine-tuned, bf16", "with QAT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=EMBEDDED)
    parser.add_argument("--variant", default="int4")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens to measure on")
    parser.add_argument("--qualities", default=",".join(QUALITIES[:2]))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every configuration")
    parser.add_argument("--output", type=Path, default=Path("runs") / "qat")
    with plain_errors("benchmark_qat"):
        benchmark(parser.parse_args())


def benchmark(arguments: argparse.Namespace) -> None:
    """Train, make and measure all models, and show and write the figures."""
    from pipeline.system.libraries import quiet
    from pipeline.workflow.run import run

    quiet()
    check_grid(arguments.model, None, 0, arguments.output)
    scores: dict[str, Scores] = {}
    seconds: dict[str, float] = {}
    for quality in arguments.qualities.split(","):
        config = configure(arguments, "plain", f"quantize.quality={quality}", rounding=quality == FAST_QUALITY)
        workspace = run(config, arguments.output)
        scores.setdefault(WHOLE, measure(config, workspace, workspace.release))
        seconds[WHOLE] = step_seconds(workspace)
        scores[f"{arguments.variant}, {quality}"] = measure(config, workspace, variant_in(arguments, workspace))
    config = configure(arguments, "qat", f"train.qat={arguments.variant}")
    workspace = run(config, arguments.output)
    scores[f"{WHOLE}, {TRAINED}"] = measure(config, workspace, workspace.release)
    seconds[f"{WHOLE}, {TRAINED}"] = step_seconds(workspace)
    scores[f"{arguments.variant}, {TRAINED}"] = measure(config, workspace, variant_in(arguments, workspace))
    rows = [row | {"step_seconds": seconds.get(row["model"])} for row in figures(scores)]
    show(arguments, rows)
    write_json(arguments.output / "qat.json", {"steps": arguments.steps, "variant": arguments.variant, "rows": rows})


def configure(arguments: argparse.Namespace, name: str, *settings: str, rounding: bool = False) -> TrainingRun:
    """Return the configuration of the demo with one variant, merged into the base that it was trained on."""
    source = str(arguments.output / REORDERED) if arguments.model == EMBEDDED else arguments.model
    variant: dict[str, Any] = {"name": arguments.variant, **({"rounding": NEAREST} if rounding else {})}
    own = {
        "name": name,
        "model.source": source,
        "data.held_out": 0.1,
        "train.max_steps": arguments.steps,
        "train.max_minutes": None,
        "merge.base": "nf4",
        "evaluate.max_tokens": arguments.tokens,
        "evaluate.max_minutes": None,
        "evaluate.prompts": [],
        "quantize.variants": [variant],
    }
    given = [*(f"{key}={json.dumps(value)}" for key, value in own.items()), *settings, *arguments.set]
    config: Any = load_config("demo", given)
    return config


def variant_in(arguments: argparse.Namespace, workspace: Workspace) -> Path:
    """Return a copy of the variant's folder, because the next quality replaces it."""
    kept = arguments.output / "kept" / arguments.variant
    shutil.rmtree(kept, ignore_errors=True)
    return Path(shutil.copytree(workspace.release / arguments.variant, kept))


def measure(config: TrainingRun, workspace: Workspace, folder: Path) -> Scores:
    """Score the held-out text with a model loaded from its files."""
    from pipeline.evaluation import metrics, texts
    from pipeline.inference.load import load
    from pipeline.models.safe_loading import open_tokenizer
    from pipeline.workflow.stages.inputs import run_texts

    known = run_texts(workspace)
    sequences = texts.held_out(config, known, texts.restore_template(open_tokenizer(workspace.release), known))
    model, _ = load(folder)
    return metrics.score(model, sequences)


def step_seconds(workspace: Workspace) -> float:
    """Return the seconds of a step of the training, its measurements included."""
    training = workspace.read_measurement("training")
    found: float = training["seconds_training"] / training["steps"]
    return found


def figures(scores: dict[str, Scores]) -> list[dict]:
    """Return the loss of each model, and its paired differences from the fine-tuned model and from the first variant.

    Losses are in nats a token, each with its standard error.
    """
    from pipeline.evaluation import metrics

    whole, nearest = scores[WHOLE], list(scores.values())[1]
    cost = metrics.mean(nearest.nll - whole.nll, whole.cluster)
    shows = cost.value > 2 * cost.stderr
    rows = []
    for name, found in scores.items():
        loss, above, below = (
            metrics.mean(values, whole.cluster)
            for values in (found.nll, found.nll - whole.nll, found.nll - nearest.nll)
        )
        rows.append(
            {
                "model": name,
                "perplexity": math.exp(loss.value),
                **{key: [value.value, value.stderr] for key, value in
                   (("loss", loss), ("above_fine_tuned", above), ("above_first_variant", below))},
                "recovered": 1 - above.value / cost.value if shows else None,
            }
        )  # fmt: skip
    return rows


def show(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """Print the table."""
    table = Table("model", "perplexity", "loss above fine-tuned", "above the first variant", "recovered", "s a step",
                  title=f"held-out text after {arguments.steps} steps")  # fmt: skip
    for row in rows:
        pairs = ("{:+.4f} ± {:.4f}".format(*row[key]) for key in ("above_fine_tuned", "above_first_variant"))
        share = "" if row["recovered"] is None else f"{row['recovered']:.0%}"
        step = f"{row['step_seconds']:.2f}" if row["step_seconds"] else ""
        table.add_row(row["model"], f"{row['perplexity']:.3f}", *pairs, share, step)
    Console().print(table)


if __name__ == "__main__":
    main()
