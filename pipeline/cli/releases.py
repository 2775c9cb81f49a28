"""The verbs of releases: publish one, take it back, and see whether it is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import RUNS, AsJson, Root, console, terminal_reporter

if TYPE_CHECKING:
    from pipeline.workflow.workspace import Workspace


def publish(
    source: Annotated[str, typer.Argument(help="A finished run, a folder made by merge or quantize, or a CONFIG.")],
    repo: Annotated[str | None, typer.Option("--repo", metavar="USER/NAME", help="Where to.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    create_pr: Annotated[bool | None, typer.Option(help="Open a pull request instead, or again not.")] = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Publish what is finished, now or again; only what changed is sent."""
    from pipeline.config.loader import load_config
    from pipeline.errors import ConfigError
    from pipeline.workflow.run import run as run_all
    from pipeline.workflow.run import run_one
    from pipeline.workflow.workspace import HIDDEN, Workspace

    settings = [f"publish.repo={repo}"] if repo else []
    for key, value in (("private", private), ("create_pr", create_pr)):
        settings += [f"publish.{key}={str(value).lower()}"] if value is not None else []
    output = None
    if Path(source).is_dir():
        workspace = Workspace.open(source)
        source = str(workspace.config_path)
        if workspace.config().evaluate is None:  # what is published is what was measured
            settings += ["evaluate={}", "model.low_disk=false"]
        if workspace.folder.name == HIDDEN:
            output = workspace.release
        else:
            _check_name(workspace)
            runs = workspace.folder.resolve().parent
    loaded = load_config(source, settings)
    if loaded.publish.repo is None:
        raise ConfigError("publish.repo: not set, so there is nowhere to publish to; use --repo USER/NAME")
    if loaded.data is None:  # it may have to be measured first
        workspace = run_all(loaded, runs, reporter=terminal_reporter(as_json), output=output, publish_again=True)
    else:
        workspace = run_one(loaded, "publish", runs, terminal_reporter(as_json))
    _say_published(workspace, as_json)


def rollback(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="A repository that tunepress published to.")],
    to: Annotated[str | None, typer.Option("--to", metavar="TAG", help="By default the release before.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an older release of a repository its head again; people's own files and texts stay."""
    from pipeline.publishing.rollback import rollback as go_back

    done = go_back(repo, to)
    if as_json:
        print(json.dumps({"repo": repo, "tag": done.tag, "commit": done.commit.oid, "url": done.commit.url}))
    else:
        print(f"{repo} is at {done.tag}: {done.commit.url}")


def verify(
    source: Annotated[str, typer.Argument(metavar="REPO|FOLDER", help="A repository USER/NAME, a release, or a run.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a repository.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Load and measure models, run snippets; or files and cards.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """See whether a release is what it says: hashes, cards, every model loaded and measured again, snippets run.

    Exit codes: 0 it is, as far as can be told here; 3 it has defects; 2 there is nothing to verify.
    """
    from pipeline.verification import verify as look
    from pipeline.verification.terminal_report import Report

    with Report(console(stderr=as_json)) as report:
        verification = look(source, revision, measure, report.progress, report.found)
    if as_json:
        print(json.dumps(verification.to_dict()))
    else:
        report.end(verification)
    raise typer.Exit(verification.exit_code)


def _say_published(workspace: Workspace, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "published": workspace.ledger()["publish"].summary}))


def _check_name(workspace: Workspace) -> None:
    from pipeline.errors import WorkspaceError

    if workspace.config().name != workspace.folder.resolve().name:
        name = workspace.config().name
        raise WorkspaceError(f"{workspace.folder}: holds the run {name!r}; give the folder that name again")
