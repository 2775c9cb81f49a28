"""The return to an older release of a repository, in one commit on the main branch.

Files that only the newer release has are removed. Files of people, and their text in the cards, stay. There is
no new tag, because the old one names this release; another rollback goes one release further back. Publishing
again brings the newer release back.
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
        to: its tag; by default the release before the current one.

    Returns:
        The release and the commit; nothing is sent if that release is the current one.

    Raises:
        HubError: if there is no such repository or release, a file of people is in the way, or the Hub refuses.
    """
    if not REPO_ID.match(repo):
        raise HubError(f"{repo}: not a repository. Try: USER/NAME")
    check_access(repo)
    target = retry_or_explain(repo, lambda: _target(repo, to))
    old = retry_or_explain(repo, lambda: read_tree(repo, target.commit))
    if not retry_or_explain(repo, lambda: old.ours):
        raise HubError(
            f"{repo}: {target.tag} has no readable {LINEAGE}, so its files are unknown. Try: another release (--to)"
        )

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
            raise HubError(f"{repo}: no release with this tag ({to}). Tagged releases: {there}")
        return found
    now = release_of(repo, read_tree(repo).head, known)
    older = [release for release in known if now is None or release.number < now.number]
    if not older:
        others = ", ".join(release.tag for release in known if release != now) or "none"
        raise HubError(f"{repo}: no release before {now.tag if now else 'the current one'}. Other releases: {others}")
    return older[-1]


def _content(old: Tree, path: str, tree: Tree) -> Content:
    """Return a file of the older release. A card gets our part of then, and people's text of now."""
    if Path(path).name != CARD:
        return Copy(old.head, path, old.files[path])
    return brought_back(old.read(path) or b"", tree.read(path))
