"""Stage `publish`: the release with the given variants, and its mirrors, each in at most one commit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Config
from pipeline.errors import HubError, UserError
from pipeline.hub.auth import check_access, create
from pipeline.hub.retry import retry_or_explain
from pipeline.hub.tree import CARD, Content, Tree, read_tree
from pipeline.publishing.cards.readmes import left_behind
from pipeline.publishing.commit import Commit, check_destination, check_root, publish, uses_xet
from pipeline.publishing.published_model import read_published
from pipeline.publishing.removal import NO_REMOVAL, published_variants
from pipeline.publishing.tags import tag_release
from pipeline.system.command_names import command
from pipeline.tracking.events import STAGES, Events, read_events
from pipeline.workflow.baseline import check_is_compared
from pipeline.workflow.kept_variants import note_removal
from pipeline.workflow.stages import Outcome
from pipeline.workflow.stages.render import (
    depends,
    folders,
    license_notice,
    local,
    mirror_files,
    release_files,
    render,
    render_mirror,
    set_aside,
    withheld,
    write,
    written_digests,
)
from pipeline.workflow.workspace import Workspace

__all__ = ["depends", "parameters", "run", "still_there"]


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {"repo": config.publish.repo}


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Publish the mirrors, and then the release, whose card names the existing mirrors.

    Raises:
        HubError: at the end, with all problems of mirrors and tags; the rest is then published.
    """
    repo, settings = config.publish.target, config.publish
    events.progress(0, 1, f"asking the Hub about {repo}")
    check_access(repo, settings.create_pr)
    private = create(repo, settings.private)
    commits, problems = _mirrors(config, workspace, events, variants, private)
    there = {v: m for v, m in settings.mirrors.items() if v in variants and (m in commits or _is_mirror(config, m))}
    commits[repo], paths, removed = _main(config, workspace, events, variants, there)
    tag = None
    if _is_finished(config, (*variants, *withheld(config, workspace))):
        for place, commit in commits.items():
            try:
                tag = tag_release(place, commit.oid)
            except HubError as error:
                problems.append(f"published, but not tagged: {error}")
    if notice := license_notice(config, workspace):
        events.show(notice)
    if left := _left_mirrors(config, withheld(config, workspace)):
        events.show(left)
    if problems:
        raise HubError("; ".join(problems))
    summary = {
        **_about(repo, commits[repo]),
        "files_sent": sum(len(c.sent) for c in commits.values()),
        "files_deleted": sum(len(c.deleted) for c in commits.values()),
        "bytes_sent": sum(c.sent_bytes for c in commits.values()),
        **({"by_xet": True} if uses_xet() else {}),
        "variants": ",".join(variants),
        **({"removed": ", ".join(removed)} if removed else {}),
        **({"tag": tag} if tag else {}),
    }
    if not settings.create_pr:  # until a pull request is merged, the next publish needs the agreement again
        note_removal(workspace, NO_REMOVAL)
    return Outcome(tuple(paths), summary)


def _main(
    config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...], mirrors: Mapping[str, str]
) -> tuple[Commit, list[Path], list[str]]:
    """Publish the release. Return the commit, the documents in the release's folder, and what was removed."""
    repo = config.publish.target
    documents: dict[str, bytes] = {}
    removal = workspace.read_ledger().removal
    there: set[str] = set()  # variants that the repository had in any attempt
    adapters: set[str] = set()
    # Read only once: the documents of a failed attempt must not be taken for people's text in the next attempt.
    here = {path: local(workspace, path) for path in (CARD, *(f"{folder}/{CARD}" for folder in folders(variants)))}

    def contents(tree: Tree) -> dict[str, Content]:
        if not config.merges:
            check_root(tree)
        removal.check_variants(tree, [spec.name for spec in config.quantize.variants])
        removal.check_adapter(tree)
        with contextlib.suppress(HubError):  # agreed to be removed, whatever they are
            there.update(published_variants(tree))
        adapters.update(removal.adapter_files(tree))
        documents.clear()
        existing = {path: _existing(workspace, tree, path, card) for path, card in here.items()}
        documents.update(render(config, workspace, variants, existing.get, mirrors))
        return {**release_files(workspace, variants), **documents}

    parts = (*(("full model",) if config.merges else ()), *variants)
    commit = _commit(config, workspace, events, repo, contents, ", ".join(parts) or "card")
    for path, copy in set_aside(workspace, documents).items():
        events.show([f"{path}: different in the repository; your local text is in {copy}"])
    paths = write(config, workspace, documents, variants)
    stages = [("train", None), ("merge", None), ("evaluate", None), *(("quantize", v) for v in variants)]
    _tell(config, workspace, events, repo, commit, stages)
    gone = [v for v in VARIANTS if v in there and v not in variants]
    return commit, paths, [*gone, *sorted(adapters)] if commit.sent or commit.deleted else []


def _existing(workspace: Workspace, tree: Tree, path: str, here: bytes | None) -> bytes | None:
    """Return the card whose text of people is kept: normally the card of the repository.

    The local card counts only if the repository has none, or still has the card of the last publish.
    """
    there = tree.read(path)
    if here is None or there is None:
        return here or there
    is_as_published = hashlib.sha256(there).hexdigest() in written_digests(workspace, path, "publish")
    return here if is_as_published else there


def _mirrors(
    config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...], private: bool
) -> tuple[dict[str, Commit], list[str]]:
    """Publish the mirrors of these variants. Return the commits, and the problems of the others."""
    commits, problems = {}, []
    wanted = {variant: mirror for variant, mirror in config.publish.mirrors.items() if variant in variants}
    if wanted:  # checked before any mirror is published
        check_destination(config.publish.target, config.name)
        retry_or_explain(config.publish.target, lambda: check_is_compared(workspace, read_tree(config.publish.target)))
    for variant, mirror in wanted.items():
        try:
            commits[mirror] = _mirror(config, workspace, events, variant, private)
        except UserError as error:
            problems.append(f"publish.mirrors.{variant}: {error}")
    return commits, problems


def still_there(config: Config, kept_out: Collection[str]) -> list[str]:
    """Return a line for each repository that still has a variant that is withheld now."""
    repo = config.publish.target
    try:
        there = read_published(repo)
    except HubError as error:
        return [
            f"{repo}: may still have {', '.join(kept_out)} of an earlier release, for it could not be read: {error}"
        ]
    there_too = there.results.variants if there and there.run == config.name else {}
    back = command("rollback", repo)
    left = ", ".join(variant for variant in kept_out if variant in there_too)
    told = f"{repo}: still has {left} of an earlier release, withheld now; remove it there, or go back with: {back}"
    return [*([told] if left else []), *_left_mirrors(config, kept_out)]


def _left_mirrors(config: Config, kept_out: Collection[str]) -> list[str]:
    """Return a line for each mirror with a variant that is withheld now, because mirrors are never emptied."""
    mirrors = {variant: config.publish.mirrors[variant] for variant in kept_out if variant in config.publish.mirrors}
    return [
        f"{mirror}: still has {variant} of an earlier release, which is withheld now; remove it there"
        for variant, mirror in mirrors.items()
        if _is_mirror(config, mirror)
    ]


def _is_mirror(config: Config, mirror: str) -> bool:
    """Return True if a repository that could not be updated is a mirror of this run."""
    try:
        there = retry_or_explain(mirror, lambda: read_tree(mirror).lineage)
    except HubError:
        return False
    return (there.run, there.mirror_of) == (config.name, config.publish.target)


def _mirror(config: Config, workspace: Workspace, events: Events, variant: str, private: bool) -> Commit:
    """Publish a variant at the root of its own repository, with the visibility of the main one.

    The Hub cannot copy files between repositories, so they are sent again.
    """
    mirror = config.publish.mirrors[variant]

    def contents(tree: Tree) -> dict[str, Content]:
        workspace.read_ledger().removal.check_adapter(tree)
        return {**mirror_files(workspace, variant), **render_mirror(config, workspace, variant, tree.read)}

    events.progress(0, 1, f"asking the Hub about {mirror}")
    check_access(mirror, config.publish.create_pr)
    create(mirror, private)
    commit = _commit(config, workspace, events, mirror, contents, variant)
    _tell(config, workspace, events, mirror, commit, [("quantize", variant)])
    return commit


def _commit(
    config: Config, workspace: Workspace, events: Events, repo: str, contents: Callable[[Tree], dict], what: str
) -> Commit:
    """Publish `contents` to one repository, in a commit or a pull request."""

    def check(tree: Tree) -> None:
        if repo == config.publish.target:
            check_is_compared(workspace, tree)

    def whole(tree: Tree) -> dict[str, Content]:
        wanted = contents(tree)
        return {**wanted, **left_behind(tree, wanted)}

    removal = workspace.read_ledger().removal
    if not config.publish.create_pr:
        message = f"{config.name}: {what}"
        return publish(repo, whole, message, progress=events.progress, check=check, removal=removal)
    last = workspace.ledger().get("publish")
    known = last.summary.get("pull_request") if last and last.summary.get("repo") == repo else None
    title = f"{config.name}: release by tunepress"  # constant, because the pull request is found by its title
    return publish(
        repo,
        whole,
        title,
        progress=events.progress,
        check=check,
        removal=removal,
        create_pr=True,
        pull_request=known,
    )


def _is_finished(config: Config, judged: tuple[str, ...]) -> bool:
    """Return True if this is a complete release, which gets a tag. A pull request gets none."""
    return not config.publish.create_pr and {spec.name for spec in config.quantize.variants} <= set(judged)


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
    """Send the push event of each of these stages, (verb, variant), once."""
    asked = {
        "train": config.data and config.train.adapts,
        "merge": config.merges,
        "evaluate": config.evaluate,
        "quantize": True,
    }
    for verb, variant in stages:
        if asked[verb] and not _is_pushed(workspace, verb, variant, repo):
            events.emit(verb, "pushed", variant, **_about(repo, commit))
    if CARD in commit.sent or not _is_pushed(workspace, "publish", None, repo):
        events.emit("publish", "pushed", **_about(repo, commit))


def _is_pushed(workspace: Workspace, verb: str, variant: str | None, repo: str) -> bool:
    """Return True if the push event for the last result of this stage was sent already."""
    stage, pushed = STAGES[verb]
    is_there = False
    for record in read_events(workspace.events_path)[0]:
        if record.get("stage") == stage and record.get("variant") == variant:
            if record["event"] == f"{stage}_completed" and verb != "publish":
                is_there = False
            elif record["event"] == pushed and record.get("repo") == repo:
                is_there = True
    return is_there
