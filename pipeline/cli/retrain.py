"""The command line of retraining, for `scripts/retrain.py` and, where only the package is, `python -m`.

Parses and calls; nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import RUNS, AsJson, ConfigArgument, Root, Settings, terminal_reporter
from pipeline.retraining.decision import MARGIN, WIDEST

if TYPE_CHECKING:
    from pipeline.retraining.report import Summary

HELP = "\n\n".join(
    (
        "Train again, and publish only if the new model beats the one that the repository has.",
        "Both are measured in this run, on held-out examples whose prompts, word for word, neither was trained on, and "
        "paired token by token (models with other tokens: in bits per byte, by prompt). The rule: better, if the loss "
        "is lower by more than --margin standard errors of the difference; of few prompts by some more, after "
        "Student's t, and fewer than 16 are not enough. Where there is no live model yet, the new one is published.",
        "Exit codes: 0 published; 3 not better, and nothing changed; 4 skipped, since neither data, base nor "
        "the settings that make the model changed (for other variants or mirrors it says what to run); 2 failed, and "
        "you can mend it; 1 failed; 75 another retraining of the repository is running; 130 stopped.",
        "What failed or was stopped has left the live model as it was, unless it says otherwise; the same command "
        "goes on from there.",
    )
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Place(StrEnum):
    here = "here"
    jobs = "hf-jobs"


@app.command(help=HELP)
def retrain(
    config: ConfigArgument,
    settings: Settings = None,
    margin: Annotated[
        float, typer.Option(min=0, max=WIDEST, help="Standard errors that the loss has to be lower by.")
    ] = MARGIN,
    force: Annotated[
        bool,
        typer.Option("--force", help="Train anew where nothing changed or it was decided; the run's files stay else."),
    ] = False,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request on the Hub instead of committing.")
    ] = False,
    summary: Annotated[
        Path | None, typer.Option(help="Append a Markdown summary to this file; to GITHUB_STEP_SUMMARY in any case.")
    ] = None,
    on: Annotated[Place, typer.Option(help="This machine, or a Hugging Face Job.")] = Place.here,
    flavor: Annotated[str, typer.Option(help="Hardware of the Job; see: hf jobs hardware")] = "a10g-large",
    timeout: Annotated[str, typer.Option(help="Longest time of the Job, as 90m, 6h or 1d.")] = "6h",
    package: Annotated[
        str | None,
        typer.Option(
            metavar="GIT|WHEEL",
            help="What the Job installs: git+https://...@COMMIT, or a wheel's address. In GitHub Actions this commit.",
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the Job to its end, and end as it does; else 0 if started.")
    ] = True,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    from pipeline.config.loader import load_config
    from pipeline.errors import UserError
    from pipeline.retraining.report import Summary, markdown, markdown_of_failure, plain

    out = sys.stderr if as_json else sys.stdout  # of progress; the outcome goes to standard output in any case
    summaries = Summary.open(summary)
    subject = config
    try:
        loaded = load_config(config, [*(settings or ()), *(["publish.create_pr=true"] if pull_request else ())])
        subject = loaded.publish.repo or loaded.name
        if on is Place.jobs:
            from pipeline.retraining.hf_jobs import Job

            job = Job(loaded, flavor, timeout, package, margin, force)
            told = job.run(runs, lambda line: print(line, file=out, flush=True), wait)
            text = told["summary"]
        else:
            from pipeline.retraining.retrain import retrain as decide

            reporter = terminal_reporter(as_json)
            decision = decide(loaded, runs, margin=margin, force=force, reporter=reporter)
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
    """A line and an exit code for what a user can mend, a traceback for our bugs."""
    from pipeline.cli.exit_codes import plain_errors

    with plain_errors("retrain"):
        app()


if __name__ == "__main__":
    main()
