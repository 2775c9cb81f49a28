"""The model that a repository has now, and of which retraining asks whether a new one is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import HubError
from pipeline.evaluation.results import Results
from pipeline.publishing.remote_release import Standing, standing
from pipeline.system.files import fingerprint


@dataclass(frozen=True)
class Live:
    """The release at the head of a repository.

    Attributes:
        head: the commit.
        model: a digest of the full model's files there; people may write into cards without changing it.
        lineage: its `tunepress.json`.
    """

    repo: str
    head: str
    model: str
    lineage: dict

    @property
    def results(self) -> Results:
        return Results.of_lineage(self.lineage, self.repo)

    @property
    def weights(self) -> str:
        """A digest of the full model's weights, as `weights_of` makes it."""
        return weights_of({path: f["sha256"] for path, f in self.lineage["files"].items()})


def read_live(repo: str) -> Live | None:
    """The release that `repo` has; None where there is no repository, or nothing of ours in it.

    Raises:
        HubError: where a model is there that tunepress did not put there, or the Hub does not say.
    """
    there = standing(repo)
    return live_in(there) if there else None


def live_in(there: Standing) -> Live | None:
    """The release that stands in a repository, if there is one with a full model."""
    tree = there.tree
    if "config.json" not in tree.files:
        return None
    if there.run is None:
        raise HubError(f"{tree.repo}: has a config.json that tunepress did not put there; use another repository")
    return Live(tree.repo, tree.head, there.model, there.told)


def weights_of(files: Mapping[str, str]) -> str:
    """A digest of the full model's weights in a release, from the sha256 of its files by path."""
    return fingerprint({p: s for p, s in files.items() if "/" not in p and p.endswith(".safetensors")})
