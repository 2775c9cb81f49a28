"""The release that a repository holds at a commit: its files, its lineage, and the model at its root."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import HubError
from pipeline.evaluation.results import Results
from pipeline.hub.retry import retry_or_explain
from pipeline.hub.tree import LINEAGE, RemoteFile, Tree, read_tree
from pipeline.models.checkpoint_files import model_digest
from pipeline.system.files import fingerprint


@dataclass(frozen=True)
class PublishedModel:
    """A repository's files at a commit, and its `tunepress.json`.

    Attributes:
        lineage: the content of `tunepress.json`; empty if no release of tunepress is there.
    """

    tree: Tree
    lineage: dict[str, Any]

    @classmethod
    def of(cls, tree: Tree) -> PublishedModel:
        """Return the release in `tree`."""
        return cls(tree, json.loads(tree.read(LINEAGE) or b"{}") if tree.lineage.run else {})

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PublishedModel:
        """Return the release that `to_json` describes."""
        tree = content["tree"]
        files = {path: RemoteFile(**file) for path, file in tree["files"].items()}
        return cls(Tree(tree["repo"], tree["head"], files), content["lineage"])

    def to_json(self) -> dict[str, Any]:
        """Return the release as values that JSON can hold."""
        return asdict(self)

    @property
    def repo(self) -> str:
        """Return the repository."""
        return self.tree.repo

    @property
    def head(self) -> str:
        """Return the commit."""
        return self.tree.head

    @property
    def run(self) -> str | None:
        """Return the run that made the release; None if no release of tunepress is there."""
        return self.lineage.get("run")

    @functools.cached_property
    def results(self) -> Results:
        """Return the figures of the release."""
        return Results.of_lineage(self.lineage, self.repo)

    @property
    def base(self) -> dict[str, Any]:
        """Return the origin of the base model, as the lineage records it."""
        base = self.lineage.get("base")
        return base if isinstance(base, dict) else {}

    @functools.cached_property
    def model(self) -> str:
        """Return a digest of the model at the root. Cards and variants do not change it."""
        return model_digest({path: file.sha256 or file.blob for path, file in self.tree.files.items()})

    @property
    def weights(self) -> str:
        """Return the `weights_digest` of the model at the root."""
        return weights_digest({path: file["sha256"] for path, file in self.lineage["files"].items()})


def read_published(repo: str, revision: str | None = None) -> PublishedModel | None:
    """Return the release in a repository; None if this user can read no such repository or commit.

    Raises:
        HubError: if the Hub does not answer.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def attempt() -> PublishedModel | None:
        try:
            return PublishedModel.of(read_tree(repo, revision))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    return retry_or_explain(repo, attempt)


def with_full_model(published: PublishedModel | None) -> PublishedModel | None:
    """Return `published` if it has a full model at its root, else None.

    Raises:
        HubError: if tunepress did not publish that model.
    """
    if published is None or "config.json" not in published.tree.files:
        return None
    if published.run is None:
        raise HubError(f"{published.repo}: tunepress did not put config.json there. Try: another repository")
    return published


def is_same_model(repo: str, commit: str, other: str) -> bool:
    """Return True if a repository has the same model at its root at two commits that both exist."""
    models = {there.model if (there := read_published(repo, revision)) else None for revision in (commit, other)}
    return None not in models and len(models) == 1


def weights_digest(files: Mapping[str, str]) -> str:
    """Return a digest of the full model's weights in a release, from the sha256 of its files by path."""
    return fingerprint({p: s for p, s in files.items() if "/" not in p and p.endswith(".safetensors")})
