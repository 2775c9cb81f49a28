"""The published model that a retraining compares with, in the run's ledger until the run is published.

Stages read it from the ledger, because they are processes of their own. `Workspace.claim` removes it, so that a
stopped retraining does not affect other runs.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import HubError
from pipeline.hub.tree import Tree
from pipeline.publishing.published_model import PublishedModel, weights_digest, with_full_model
from pipeline.workflow.workspace import Workspace


def note(workspace: Workspace, published: PublishedModel | None, inputs: dict) -> None:
    """Record which published model the run is compared with, and the inputs of the run."""
    about = {"published": published.to_json() if published else None, "inputs": inputs}
    workspace.update(lambda ledger: replace(ledger, comparison=about))


def noted(workspace: Workspace) -> tuple[PublishedModel | None, dict]:
    """Return the published model and the inputs that `note` recorded."""
    about = workspace.read_ledger().comparison or {"published": None, "inputs": {}}
    published = about["published"]
    return (PublishedModel.from_json(published) if published else None), about["inputs"]


def forget(workspace: Workspace) -> None:
    """Remove the published model and the inputs from the ledger."""
    workspace.update(lambda ledger: replace(ledger, comparison=None))


def own_weights(workspace: Workspace) -> str:
    """Return the digest of the run's merged model, comparable with `PublishedModel.weights`."""
    files = workspace.state_of("merge").get("merge", {})
    return weights_digest({path.removeprefix("release/"): sha256 for path, sha256 in files.items()})


def check_is_compared(workspace: Workspace, tree: Tree) -> None:
    """Raise if the repository no longer has the model that this run was compared with.

    The run's own model is accepted: it is there if the answer to a commit was lost.

    Raises:
        HubError: if another run has published in between.
    """
    if workspace.read_ledger().comparison is None:
        return
    compared, now = noted(workspace)[0], with_full_model(PublishedModel.of(tree))
    is_ours = now is not None and now.weights == own_weights(workspace)
    if not is_ours and (compared.model if compared else None) != (now.model if now else None):
        raise HubError(f"{tree.repo}: its model changed after the comparison. Try: retrain again")
