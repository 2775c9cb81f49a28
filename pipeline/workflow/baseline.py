"""What a retraining is compared with, left in its run's ledger until it is published.

The stages, which are processes of their own, find it there; `Workspace.claim` removes it, so that what a
retraining left that was stopped binds retrainings alone.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from pipeline.errors import HubError
from pipeline.hub.tree import Tree
from pipeline.publishing.published_model import Live, live_in, weights_of
from pipeline.publishing.remote_release import Standing
from pipeline.workflow.workspace import Workspace


def note(workspace: Workspace, live: Live | None, inputs: dict) -> None:
    """Write to the ledger which published model the run is compared with, and the inputs of the run."""
    about = {"live": asdict(live) if live else None, "inputs": inputs}
    workspace.update(lambda ledger: replace(ledger, comparison=about))


def noted(workspace: Workspace) -> tuple[Live | None, dict]:
    """What `note` left: the live model, and the inputs."""
    about = workspace.read_ledger().comparison or {"live": None, "inputs": {}}
    return (Live(**about["live"]) if about["live"] else None), about["inputs"]


def forget(workspace: Workspace) -> None:
    """Have the run compared with nothing from now on."""
    workspace.update(lambda ledger: replace(ledger, comparison=None))


def own_weights(workspace: Workspace) -> str:
    """A digest of the run's own model's weights, to be compared with that of a release."""
    files = workspace.state_of("merge").get("merge", {})
    return weights_of({path.removeprefix("release/"): sha256 for path, sha256 in files.items()})


def check_is_compared(workspace: Workspace, tree: Tree) -> None:
    """Refuse to publish on top of another model than the one that this run was compared with, if it was with any.

    Its own is none: it is there where the answer to a commit was lost.

    Raises:
        HubError: where somebody else has published in between.
    """
    if workspace.read_ledger().comparison is None:
        return
    compared, now = noted(workspace)[0], live_in(Standing.of(tree))
    is_ours = now is not None and now.weights == own_weights(workspace)
    if not is_ours and (compared.model if compared else None) != (now.model if now else None):
        raise HubError(f"{tree.repo}: has another model than the one that this was compared with; retrain again")
