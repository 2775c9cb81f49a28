"""Bring the repository, and the mirrors, to the release with the given variants: in one commit each, or in none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import HubError
from pipeline.events import STAGES, Events, read_events
from pipeline.stages import Outcome
from pipeline.stages.document import depends, local, mirror_files, release_files, render, render_mirror, write
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.hub import Commit, Content, Tree

__all__ = ["depends", "parameters", "run"]


def parameters(config: Config, variant: str | None) -> dict:
    return {"repo": config.publish.repo}


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """What the Hub refuses of a mirror or a tag is told at the end, when all that it takes is there."""
    from pipeline import hub

    repo, settings, paths = config.publish.repo, config.publish, []

    def contents(tree: Tree) -> dict[str, Content]:
        documents = render(config, workspace, variants, lambda path: _existing(workspace, tree, path))
        paths[:] = write(workspace, documents, variants)
        return {**release_files(workspace, variants), **documents}

    events.progress(0, 1, f"asking the Hub about {repo}")
    hub.check_access(repo, settings.create_pr)
    private = hub.create(repo, settings.private)
    parts = (*(("full model",) if config.merges else ()), *variants)
    commits = {repo: _commit(config, workspace, events, repo, contents, ", ".join(parts) or "card")}
    stages = [("train", None), ("merge", None), ("evaluate", None), *(("quantize", v) for v in variants)]
    _tell(config, workspace, events, repo, commits[repo], stages)
    tag, problems = None, []
    for variant, mirror in settings.mirrors.items():
        if variant in variants:
            try:
                commits[mirror] = _mirror(config, workspace, events, variant, private)
            except HubError as error:
                problems.append(f"publish.mirrors.{variant}: {error}")
    if _is_finished(config, variants):
        for place, commit in reversed(commits.items()):
            try:
                tag = hub.tag_release(place, commit.oid)
            except HubError as error:
                problems.append(f"published, but not tagged: {error}")
    if problems:
        raise HubError("; ".join(problems))
    summary = {
        **_about(repo, commits[repo]),
        "files_sent": sum(len(c.sent) for c in commits.values()),
        "files_deleted": sum(len(c.deleted) for c in commits.values()),
        "bytes_sent": sum(c.sent_bytes for c in commits.values()),
        "variants": ",".join(variants),
        **({"tag": tag} if tag else {}),
    }
    return Outcome(tuple(paths), summary)


def _existing(workspace: Workspace, tree: Tree, path: str) -> bytes | None:
    """The card that people may have written into: the repository's, which others have read already.

    The local one only where the repository has none, or still has the one of the last publish.
    """
    there, here = tree.read(path), local(workspace, path)
    last = workspace.ledger().get("publish")
    name = Path(os.path.relpath(workspace.release / path, workspace.folder)).as_posix()
    known = last.outputs[name].sha256 if last and name in last.outputs else None
    unchanged = there is not None and hashlib.sha256(there).hexdigest() == known
    return here if here is not None and (there is None or unchanged) else there


def _mirror(config: Config, workspace: Workspace, events: Events, variant: str, private: bool) -> Commit:
    """Publish a variant at the root of a repository of its own, as private as the main one.

    Its files cannot be copied there on the Hub, so they are sent again.
    """
    from pipeline import hub

    mirror = config.publish.mirrors[variant]

    def contents(tree: Tree) -> dict[str, Content]:
        return {**mirror_files(workspace, variant), **render_mirror(config, workspace, variant, tree.read)}

    events.progress(0, 1, f"asking the Hub about {mirror}")
    hub.check_access(mirror, config.publish.create_pr)
    hub.create(mirror, private)
    commit = _commit(config, workspace, events, mirror, contents, variant)
    _tell(config, workspace, events, mirror, commit, [("quantize", variant)])
    return commit


def _commit(
    config: Config, workspace: Workspace, events: Events, repo: str, contents: Callable[[Tree], dict], what: str
) -> Commit:
    """Bring one repository to `contents`, in a commit or a pull request."""
    from pipeline import hub
    from pipeline.cards.readmes import left_behind

    def whole(tree: Tree) -> dict[str, Content]:
        wanted = contents(tree)
        return {**wanted, **left_behind(tree, wanted)}

    if not config.publish.create_pr:
        return hub.publish(repo, whole, f"{config.name}: {what}", progress=events.progress)
    last = workspace.ledger().get("publish")
    known = last.summary.get("pull_request") if last and last.summary.get("repo") == repo else None
    title = f"{config.name}: release by tunepress"  # by which it is found again, so not what is in it
    return hub.publish(repo, whole, title, progress=events.progress, create_pr=True, pull_request=known)


def _is_finished(config: Config, variants: tuple[str, ...]) -> bool:
    """Is this a whole release, to be tagged? One in a pull request is only proposed."""
    return not config.publish.create_pr and {spec.name for spec in config.quantize.variants} <= set(variants)


def _about(repo: str, commit: Commit) -> dict:
    number = {} if commit.pull_request is None else {"pull_request": commit.pull_request}
    return {"url": commit.url, "commit": commit.oid, "repo": repo, **number}


def _tell(
    config: Config,
    workspace: Workspace,
    events: Events,
    repo: str,
    commit: Commit,
    stages: list[tuple[str, str | None]],
) -> None:
    """Report what each of these stages, (verb, variant), made as being on the Hub, once."""
    asked = {"train": config.data, "merge": config.merges, "evaluate": config.evaluate, "quantize": True}
    for verb, variant in stages:
        if asked[verb] and not _is_pushed(workspace, verb, variant, repo):
            events.emit(verb, "pushed", variant, **_about(repo, commit))
    if "README.md" in commit.sent or not _is_pushed(workspace, "publish", None, repo):
        events.emit("publish", "pushed", **_about(repo, commit))


def _is_pushed(workspace: Workspace, verb: str, variant: str | None, repo: str) -> bool:
    """Was what this stage made last already reported as being on the Hub?"""
    stage, pushed = STAGES[verb]
    is_there = False
    for record in read_events(workspace.events_path)[0]:
        if record.get("stage") == stage and record.get("variant") == variant:
            if record["event"] == f"{stage}_completed" and verb != "publish":
                is_there = False
            elif record["event"] == pushed and record.get("repo") == repo:
                is_there = True
    return is_there
