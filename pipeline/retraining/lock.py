"""Locks against two retrainings of one repository at once, on this machine or as a Job of this user.

Retrainings on other machines, Jobs of other users, and Jobs that the token may not list are not detected. If one
of them publishes first, this one compares with its model before it publishes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError, WorkspaceError
from pipeline.hub.auth import keyless, who_is
from pipeline.hub.retry import retry_or_explain, status_of

LABEL = "tunepress-retraining"
IN_A_JOB = "TUNEPRESS_CONFIG"  # set in the environment of a Job, which does not refuse to run beside itself


class Busy(UserError):
    """Another retraining of the same repository is under way."""

    exit_code = 75  # EX_TEMPFAIL: try again later


@contextlib.contextmanager
def alone(repo: str) -> Iterator[None]:
    """Keep other retrainings of a repository from running on this machine.

    Raises:
        Busy: if one runs.
        WorkspaceError: if the lock cannot be written.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import constants

    folder = Path(constants.HF_HOME) / "tunepress"
    lock = FileLock(folder / f"retrain--{repo.replace('/', '--').lower()}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(f"{repo}: another retraining is running on this machine. Try: again when it has ended") from None
    except OSError as error:
        raise WorkspaceError(
            f"{folder}: cannot be written ({error.strerror}). Try: export HF_HOME=A_WRITABLE_FOLDER"
        ) from None
    try:
        yield
    finally:
        lock.release()


def labels(repo: str) -> dict[str, str]:
    """Return the labels of Jobs that retrain a repository."""
    return {LABEL: repo.replace("/", "--").lower()}


def refuse_beside_job(repo: str) -> None:
    """Raise if a Job of this user retrains the repository. Nothing is checked if the token may not list Jobs.

    Raises:
        Busy: naming the Job.
        HubAway: if the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token

    if keyless() or IN_A_JOB in os.environ or not (token := get_token()):
        return

    def attempt() -> str | None:
        who = who_is(repo, token)["name"]
        try:
            active = HfApi().list_jobs(status=["RUNNING", "SCHEDULING"], labels=labels(repo), namespace=who)
            return next((job.url for job in active), None)
        except Exception as error:
            if status_of(error) in (401, 403, 404):
                return None
            raise

    if url := retry_or_explain(repo, attempt):
        raise Busy(f"{repo}: another retraining is running as a Job: {url}")
