"""What stands in a repository: its files, what the release there says of itself, and the model at its root."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.results import Results
from pipeline.hub.retry import retry_or_explain
from pipeline.hub.tree import LINEAGE, Tree, read_tree
from pipeline.models.checkpoint_files import model_digest


@dataclass(frozen=True)
class Standing:
    """A repository's files at a commit, and what its last release says of itself."""

    tree: Tree
    told: dict[str, Any]

    @classmethod
    def of(cls, tree: Tree) -> Standing:
        return cls(tree, json.loads(tree.read(LINEAGE)) if tree.lineage.run else {})

    @property
    def run(self) -> str | None:
        """The run whose release it is; None where there is none of ours."""
        return self.tree.lineage.run

    @functools.cached_property
    def results(self) -> Results:
        """The figures of its release."""
        return Results.of_lineage(self.told, self.tree.repo)

    @property
    def base(self) -> dict[str, Any]:
        """The model that its release is made of, as it was recorded."""
        base = self.told.get("base")
        return base if isinstance(base, dict) else {}

    @functools.cached_property
    def model(self) -> str:
        """A digest of the model at its root; cards, variants and what lies beside them count for nothing."""
        return model_digest({path: file.sha256 or file.blob for path, file in self.tree.files.items()})


def standing(repo: str, revision: str | None = None) -> Standing | None:
    """What stands in a repository; None where there is no such repository or commit that this user may read.

    Raises:
        HubError: where the Hub does not say.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def attempt() -> Standing | None:
        try:
            return Standing.of(read_tree(repo, revision))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    return retry_or_explain(repo, attempt)


def is_same_model(repo: str, commit: str, other: str) -> bool:
    """Has a repository the same model at its root at two commits? Not where one of them is gone."""
    models = {there.model if (there := standing(repo, revision)) else None for revision in (commit, other)}
    return None not in models and len(models) == 1
