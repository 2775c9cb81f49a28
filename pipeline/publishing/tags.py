"""Tags of finished releases: release-1, release-2, ...

Two commits hold the same release if their lineage is the same, which has the hash of every file. Text that
people add to a card, or a return to an old release, therefore makes no new release.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.hub.retry import retry_or_explain
from pipeline.hub.tree import LINEAGE

TAG = re.compile(r"release-([1-9]\d*)\Z")


@dataclass(frozen=True)
class Release:
    """A tagged release and its commit."""

    number: int
    commit: str

    @property
    def tag(self) -> str:
        """Return the name of the tag."""
        return f"release-{self.number}"


def releases(repo: str) -> list[Release]:
    """Return the tagged releases of a repository, oldest first."""
    from huggingface_hub import HfApi

    tags = HfApi().list_repo_refs(repo).tags
    found = [Release(int(m[1]), t.target_commit) for t in tags if (m := TAG.match(t.name))]
    return sorted(found, key=lambda release: release.number)


def release_of(repo: str, commit: str, known: list[Release]) -> Release | None:
    """Return the newest tagged release that is the same as the one at `commit`."""
    exact = [release for release in known if release.commit == commit]
    if exact:
        return exact[-1]
    lineage = _lineage(repo, commit)
    return next((r for r in reversed(known) if lineage and _lineage(repo, r.commit) == lineage), None)


def tag_release(repo: str, commit: str) -> str:
    """Tag the release at `commit` with the next free number, unless it has a tag.

    Returns:
        The tag.

    Raises:
        HubError: if the Hub refuses. The commit stays, and a later publish tags it.
    """
    from huggingface_hub import HfApi

    def attempt() -> str:
        known = releases(repo)
        found = release_of(repo, commit, known)
        if found is None:
            found = Release(known[-1].number + 1 if known else 1, commit)
            HfApi().create_tag(repo, tag=found.tag, revision=commit)
        return found.tag

    return retry_or_explain(repo, attempt, advice="publish again to tag it")


def _lineage(repo: str, commit: str) -> str | None:
    """Return the git blob of the lineage at a commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    items = HfApi().list_repo_tree(repo, revision=commit)
    return next((item.blob_id for item in items if isinstance(item, RepoFile) and item.path == LINEAGE), None)
