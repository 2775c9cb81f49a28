"""Make an older release of a repository the head of its main branch again, in one commit.

What the newer release put there and the older did not have goes; people's own files, and what they
wrote into the cards, stay. No new tag is made: the old one names this release, and another
rollback goes one release further back. Publishing again brings the newer release back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import REPO_ID
from pipeline.errors import HubError
from pipeline.hub.auth import check_access
from pipeline.hub.retry import retry_or_explain
from pipeline.hub.tree import CARD, LINEAGE, Content, Copy, Tree, read_tree
from pipeline.publishing.cards.readmes import brought_back, left_behind
from pipeline.publishing.commit import Commit, publish
from pipeline.publishing.tags import Release, release_of, releases


@dataclass(frozen=True)
class Rollback:
    """The release that is the head again, and the commit that made it so."""

    tag: str
    commit: Commit


def rollback(repo: str, to: str | None = None) -> Rollback:
    """Bring `repo` back to a tagged release.

    Args:
        to: its tag; by default the release before the one that is there now.

    Returns:
        What was done; where that release was there already, the head as it was and nothing sent.

    Raises:
        HubError: where there is no such repository or release, a file of somebody else's is in the way,
            or the Hub refuses.
    """
    if not REPO_ID.match(repo):
        raise HubError(f"{repo}: a repository is written USER/NAME")
    check_access(repo)
    target = retry_or_explain(repo, lambda: _target(repo, to))
    old = retry_or_explain(repo, lambda: read_tree(repo, target.commit))
    if not retry_or_explain(repo, lambda: old.ours):
        raise HubError(f"{repo}: {target.tag} has no {LINEAGE} that says what to go back to")

    def contents(tree: Tree) -> dict[str, Content]:
        wanted = {path: _content(old, path, tree) for path in sorted(old.ours)}
        return {**wanted, **left_behind(tree, wanted)}

    commit = publish(repo, contents, f"Back to {target.tag}", advice="run the rollback again")
    return Rollback(target.tag, commit)


def _target(repo: str, to: str | None) -> Release:
    known = releases(repo)
    if to is not None:
        found = next((release for release in known if release.tag == to), None)
        if found is None:
            there = ", ".join(release.tag for release in known) or "none"
            raise HubError(f"{repo}: no release {to}; tagged releases: {there}")
        return found
    now = release_of(repo, read_tree(repo).head, known)
    older = [release for release in known if now is None or release.number < now.number]
    if not older:
        others = ", ".join(release.tag for release in known if release != now) or "none"
        raise HubError(f"{repo}: no release before {now.tag if now else 'this one'}; others to go to: {others}")
    return older[-1]


def _content(old: Tree, path: str, tree: Tree) -> Content:
    """A file of the older release; of a card only our part of it."""
    if Path(path).name != CARD:
        return Copy(old.head, path, old.files[path])
    return brought_back(old.read(path), tree.read(path))
