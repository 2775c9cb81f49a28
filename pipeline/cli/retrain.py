"""The command line of retraining, for `scripts/retrain.py` and `python -m pipeline.cli.retrain`."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import (
    RUNS,
    AsJson,
    ConfigArgument,
    Remove,
    Replace,
    ReplaceAdapter,
    Root,
    Settings,
    terminal_reporter,
)
from pipeline.retraining.decision import LARGEST_MARGIN, MARGIN

if TYPE_CHECKING:
    from pipeline.retraining.report import Summary

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


class Place(StrEnum):
    """Machines that a retraining runs on."""

    here = "here"
    jobs = "hf-jobs"


@app.command()
def retrain(
    config: ConfigArgument,
    settings: Settings = None,
    margin: Annotated[
        float, typer.Option(min=0, max=LARGEST_MARGIN, help="Standard errors by which the loss must be lower.")
    ] = MARGIN,
    force: Annotated[
        bool,
        typer.Option("--force", help="Train again even if nothing changed, or the decision was already made."),
    ] = False,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request on the Hub instead of committing.")
    ] = False,
    summary: Annotated[
        Path | None, typer.Option(help="Append a Markdown summary to this file; GITHUB_STEP_SUMMARY always gets it.")
    ] = None,
    on: Annotated[Place, typer.Option(help="This machine, or a Hugging Face Job.")] = Place.here,
    flavor: Annotated[str, typer.Option(help="Hardware of the Job; list it with: hf jobs hardware")] = "a10g-large",
    timeout: Annotated[str, typer.Option(help="Time limit of the Job, such as 90m, 6h or 1d.")] = "6h",
    package: Annotated[
        str | None,
        typer.Option(
            metavar="GIT|WHEEL",
            help="Package for the Job: git+https://...@COMMIT or a wheel's URL. GitHub Actions: this commit.",
        ),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait", help="Wait for the Job and return its exit code; or return 0 when it has started."
        ),
    ] = True,
    remove: Remove = None,
    replace: Replace = False,
    replace_adapter: ReplaceAdapter = False,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Train again, and publish only if the new model beats the published model.

    This run measures both models on held-out examples. Their prompts are in the training data of neither model. The
    losses are compared token by token; models with different tokenizers are compared in bits per byte, by prompt.

    The new model is better if its loss is lower by more than --margin standard errors of the difference. If there are
    few prompts, or a few have most of the tokens, the margin is wider, by Student's t. At least 16 prompts are needed.
    If nothing is published yet, the new model is published.

    Exit codes: 0 published; 3 not better, so nothing changed; 4 skipped, because data, base model and training
    settings did not change; 2 an error that you can correct; 1 failed; 75 another retraining of the repository is
    running; 130 stopped.

    After a failure or a stop the published model is unchanged, unless the message says otherwise. The same command
    continues the run.
    """
    from pipeline.config.loader import load_config
    from pipeline.errors import UserError
    from pipeline.retraining.report import Summary, markdown, markdown_of_failure, plain
    from pipeline.workflow.kept_variants import removal

    out = sys.stderr if as_json else sys.stdout  # for progress; the result always goes to standard output
    summaries = Summary.open(summary)
    subject = config
    try:
        loaded = load_config(config, [*(settings or ()), *(["publish.create_pr=true"] if pull_request else ())])
        subject = loaded.publish.repo or loaded.name
        agreed = removal(remove or (), replace, replace_adapter)
        if on is Place.jobs:
            from pipeline.retraining.hf_jobs import Job

            job = Job(loaded, flavor, timeout, package, margin, force, agreed)
            told = job.run(runs, lambda line: print(line, file=out, flush=True), wait)
            text = told["summary"]
        else:
            from pipeline.retraining.retrain import retrain as decide

            reporter = terminal_reporter(as_json)
            decision = decide(loaded, runs, margin=margin, force=force, removal=agreed, reporter=reporter)
            told, text = plain(decision), markdown(decision)
    except UserError as error:
        _append(summaries, markdown_of_failure(subject, str(error)))
        raise
    _append(summaries, text)
    print(json.dumps(told) if as_json else told["reason"])
    sys.exit(told["exit_code"])


def _append(summaries: Summary, text: str) -> None:
    for problem in summaries.append(text + "\n"):
        print(f"retrain: {problem}", file=sys.stderr)


def main() -> None:
    """Run the `retrain` command."""
    from pipeline.cli.exit_codes import plain_errors

    with plain_errors("retrain"):
        app()


if __name__ == "__main__":
    main()
