"""Quantize a model that is on the Hub, or in a folder, and publish the variants.

    python scripts/quantize_standalone.py MODEL REPO [options]
    python scripts/quantize_standalone.py user/model user/model --quant-type both
    python scripts/quantize_standalone.py ./my-model user/my-model --quant-type int4_weight_only --public
    python scripts/quantize_standalone.py user/model --save-only --output out
    python scripts/quantize_standalone.py MODELS.yaml

MODEL and REPO may be the same: the variants go into folders of that repository, its own files are not touched, and
its card gains one marked section. Whatever is measured is measured through the files that are published. Run again,
it sends what changed, and nothing where nothing did.

MODELS.yaml is a list; options on the command line hold for those of it that do not say otherwise:

    - {model: user/one, repo: user/one, quant_types: [both]}
    - {model: user/two, repo: user/two-quantized, group_size: 64, quality: calibrated, calibration_text: notes.txt}
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

CLONE = Path(__file__).resolve().parents[1]

try:
    import typer
except ModuleNotFoundError:
    sys.exit(
        f"quantize_standalone: this Python ({sys.executable}) lacks what tunepress needs; "
        f"take {CLONE}/.venv/bin/python, which {CLONE}/launch.sh sets up, "
        f"or run: {sys.executable} -m pip install {CLONE}"
    )

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.split("\n")[0])
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL|MODELS.yaml", help="Hub id, folder, or a list of models.")],
    repo: Annotated[str | None, typer.Argument(metavar="REPO", help="USER/NAME; may be MODEL's own.")] = None,
    quant_types: Annotated[
        list[str] | None,
        typer.Option("--quant-type", help="int8_weight_only (the default), int4_weight_only, both, ... Repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where models are measured: auto, cpu or cuda.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale, for variants in groups; by default 128.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Hub token. Better: HF_TOKEN, or hf auth login; the process list shows this.")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    trackio_url: Annotated[str | None, typer.Option(help="A Space's address, or that of a Trackio server.")] = None,
    experiment_name: Annotated[str | None, typer.Option(help="Name of the run; by default REPO's.")] = None,
    dataset_repo: Annotated[str | None, typer.Option(help="Data set that the Space keeps Trackio's data in.")] = None,
    save_only: Annotated[bool | None, typer.Option("--save-only", help="Make and measure, but do not publish.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")] = None,
    output: Annotated[str | None, typer.Option(help="A new folder for the variants; by default runs/NAME.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text that variants are MEASURED on: builtin:NAME, or a .txt file, two empty lines between documents."
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="fast, calibrated or distilled: each loses less and takes longer; the last two need a text."),
    ] = None,
    calibration_text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|ID",
            help="Text that variants are CALIBRATED on, never the measured one: a file, a data set on the Hub, "
            "builtin:python-docs, or general (the unmeasured rest of that text). Repeatable; several are mixed.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of --calibration-text; by default 32768.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE", help="What int4 must reach: rise=0.03, size_mb=500 or bits=4.8."),
    ] = None,
    low_disk: Annotated[
        bool | None, typer.Option("--low-disk", help="Fetch shard by shard; with --save-only, unmeasured.")
    ] = None,
    max_rise: Annotated[
        float | None, typer.Option(help="How much perplexity may rise, 0.05 for 5 %; by default int8 2 %, int4 5 %.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Largest KL divergence in nats a token; by default any.")] = None,
    on_gate_failure: Annotated[
        str | None,
        typer.Option(help="If it loses more: withhold it (the default), or warn. --target gives it more bits instead."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="VARIANT", help="Remove this earlier variant. Repeatable.")
    ] = None,
    replace: Annotated[
        bool | None, typer.Option("--replace", help="Remove every variant that --quant-type does not name.")
    ] = None,
    replace_adapter: Annotated[
        bool | None, typer.Option("--replace-adapter", help="Remove an adapter of other people at REPO's root.")
    ] = None,
) -> None:
    options = {name: value for name, value in locals().items() if name not in ("model", "token")}
    options = {name: value for name, value in options.items() if value is not None}
    if token == "":
        raise typer.BadParameter("it is empty", param_hint="'--token'")
    if token:
        print(
            "--token: the process list shows it to others; set HF_TOKEN, or log in with: hf auth login", file=sys.stderr
        )
        os.environ["HF_TOKEN"] = token
    sys.exit(_all(Path(model), options) if model.endswith((".yaml", ".yml")) else _one({"model": model, **options}))


def _one(options: dict) -> int:
    from pipeline.cli.terminal import summary
    from pipeline.workflow.hub_variants import quantize
    from pipeline.workflow.variant_tasks import read_task

    reporter = _reporter()
    workspace = quantize(read_task(options, "options"), reporter=reporter)
    os.environ.setdefault("TUNEPRESS_COMMAND", "tunepress" if shutil.which("tunepress") else f"{CLONE}/launch.sh")
    summary(reporter.console, workspace.config(), workspace)
    return 0


def _all(path: Path, options: dict) -> int:
    from pipeline.workflow.hub_variants import quantize_all
    from pipeline.workflow.variant_tasks import read_tasks

    tasks = read_tasks(path, options)
    problems = quantize_all(tasks, reporter=_reporter())
    for task, problem in zip(tasks, problems, strict=True):
        told = problem or "done"
        print(told if told.startswith(f"{task.model}:") else f"{task.model}: {told}")
    return 2 if any(problems) else 0


def _reporter():
    from rich.console import Console

    from pipeline.cli.terminal import TerminalReporter

    return TerminalReporter(Console(highlight=False, soft_wrap=True))


if __name__ == "__main__":
    sys.path.insert(0, str(CLONE))  # a clone needs no installation
    from pipeline.cli.exit_codes import plain_errors

    with plain_errors("quantize_standalone"):
        app()
