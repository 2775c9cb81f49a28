"""The verbs of releases: `publish`, `rollback` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import RUNS, AsJson, Remove, Replace, ReplaceAdapter, Root, console, terminal_reporter

if TYPE_CHECKING:
    from pipeline.workflow.workspace import Workspace


def publish(
    source: Annotated[str, typer.Argument(help="A finished run, a folder made by merge or quantize, or a CONFIG.")],
    repo: Annotated[str | None, typer.Option("--repo", metavar="USER/NAME", help="Repository to publish to.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    create_pr: Annotated[bool | None, typer.Option(help="Open a pull request instead of committing.")] = None,
    remove: Remove = None,
    replace: Replace = False,
    replace_adapter: ReplaceAdapter = False,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Publish a release, and upload only changed files. Variants of earlier releases stay unless you remove them."""
    from pipeline.config.loader import load_config
    from pipeline.errors import ConfigError
    from pipeline.workflow.kept_variants import removal
    from pipeline.workflow.run import run as run_all
    from pipeline.workflow.run import run_one
    from pipeline.workflow.workspace import HIDDEN, Workspace

    agreed = removal(remove or (), replace, replace_adapter)
    settings = [f"publish.repo={repo}"] if repo else []
    for key, value in (("private", private), ("create_pr", create_pr)):
        settings += [f"publish.{key}={str(value).lower()}"] if value is not None else []
    output = None
    if Path(source).is_dir():
        workspace = Workspace.open(source)
        source = str(workspace.config_path)
        if workspace.config().evaluate is None:  # only measured models are published
            settings += ["evaluate={}", "model.low_disk=false"]
        if workspace.folder.name == HIDDEN:
            output = workspace.release
        else:
            _check_name(workspace)
            runs = workspace.folder.resolve().parent
    loaded = load_config(source, settings)
    if loaded.publish.repo is None:
        raise ConfigError("publish.repo: not set. Try: --repo USER/NAME")
    if loaded.data is None:  # the model may not be measured yet
        workspace = run_all(
            loaded, runs, reporter=terminal_reporter(as_json), output=output, publish_again=True, removal=agreed
        )
    else:
        workspace = run_one(loaded, "publish", runs, terminal_reporter(as_json), removal=agreed)
    if as_json:
        print(json.dumps({"run": str(workspace.folder), "published": workspace.ledger()["publish"].summary}))


def rollback(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="A repository that tunepress published to.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="TAG", help="Tag of the release (default: the previous one).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Restore an older release of a repository, and keep files and texts of other people."""
    from pipeline.publishing.rollback import rollback as go_back

    done = go_back(repo, to)
    if as_json:
        about = {"commit": done.commit.oid, "url": done.commit.url, "files_deleted": len(done.commit.deleted)}
        print(json.dumps({"repo": repo, "tag": done.tag, **about}))
    else:
        removed = f", {len(done.commit.deleted)} files of the newer release removed" if done.commit.deleted else ""
        print(f"{repo} is at {done.tag}{removed}: {done.commit.url}")


def verify(
    source: Annotated[str, typer.Argument(metavar="REPO|FOLDER", help="A repository USER/NAME, a release, or a run.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a repository.")] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Load and measure models and run snippets; or check only files and cards."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Check hashes and cards of a release, measure every model again, and run the card's snippets.

    Exit codes: 0 no defects found; 3 defects found; 2 nothing to verify.
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


def _check_name(workspace: Workspace) -> None:
    from pipeline.errors import WorkspaceError

    if workspace.config().name != workspace.folder.resolve().name:
        name = workspace.config().name
        raise WorkspaceError(f"{workspace.folder}: holds the run {name!r}. Try: rename the folder to {name}")
