"""The Hub: what a repository holds, what must change, one atomic commit.

`publish` compares by hash, sends what differs, deletes by name what tunepress had put
there and no longer does, and touches nothing else. When somebody else's commit comes in
between, the head is read again and compared again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import HubError, is_unreachable, redact
from pipeline.workspace import sha256

LINEAGE = "tunepress.json"
ATTEMPTS = 4
BACKOFF_SECONDS = 1.0

Content = Path | bytes


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub knows it: `sha256` for LFS files, the git blob's sha1 for the others."""

    size: int
    blob: str
    sha256: str | None

    def holds(self, content: Content) -> bool:
        """Is this the same content? Hashes only where the size agrees."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size != self.size:
            return False
        if self.sha256:
            digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
            return digest == self.sha256
        data = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.blob


@dataclass(frozen=True)
class Tree:
    """A repository's files at its head commit."""

    head: str
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Commit:
    """What `publish` did: the head after it, and the files it changed (none: nothing had to be sent)."""

    oid: str
    url: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    sent_bytes: int


def check_access(repo: str) -> None:
    """Is there a token, and may it write to `repo`?

    Raises:
        HubError: saying which of these it is not, and what to do.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise HubError(f"publish.repo {repo}: no Hub token; set HF_TOKEN or run: hf auth login")
    try:
        who = HfApi().whoami()
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        reason = "the Hub does not know this token; log in again with: hf auth login"
        raise HubError(f"publish.repo {repo}: {reason if code in (401, 403) else _say(error)}") from None
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise HubError(f"publish.repo {repo}: the Hub cannot be reached: {_say(error)}") from None
    owner = repo.split("/")[0]
    names = [who.get("name"), *(o.get("name") for o in who.get("orgs", []))]
    if owner not in names:
        raise HubError(f"publish.repo {repo}: this token belongs to {names[0]}, who cannot write to {owner}/")
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"publish.repo {repo}: the token may only read; make one that may write")


def create(repo: str, private: bool) -> None:
    """Make the repository if there is none; the visibility of an existing one stays as it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi()
    try:
        try:
            api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private, exist_ok=True)
    except HfHubHTTPError as error:
        raise _explained(repo, error) from None


def read_tree(repo: str) -> Tree:
    """The files of a repository's head."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    head = api.model_info(repo).sha
    items = api.list_repo_tree(repo, recursive=True, revision=head)
    files = {
        i.path: RemoteFile(i.size, i.blob_id, i.lfs.sha256 if i.lfs else None) for i in items if isinstance(i, RepoFile)
    }
    return Tree(head, files)


def publish(repo: str, wanted: Mapping[str, Content], message: str) -> Commit:
    """Bring a repository to these files of ours, in one commit, or in none if they are there already.

    Args:
        wanted: every file that is ours: path in the repository -> content.

    Raises:
        HubError: where a file of somebody else's is in the way, or after a bounded number of
            attempts; the repository is then as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    problem: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        try:
            tree = read_tree(repo)
            ours = _ours(repo, tree)
            foreign = sorted((wanted.keys() & tree.files.keys()) - ours)
            if foreign:
                raise HubError(
                    f"{repo}: has a {foreign[0]} that tunepress did not put there; choose another repository"
                )
            changed = {p: c for p, c in wanted.items() if p not in tree.files or not tree.files[p].holds(c)}
            gone = sorted((ours & tree.files.keys()) - wanted.keys())
            if not changed and not gone:
                return Commit(tree.head, _url(repo, tree.head), (), (), 0)
            # Operations are used up by an attempt, so each makes its own.
            operations = [CommitOperationAdd(p, c if isinstance(c, bytes) else str(c)) for p, c in changed.items()]
            operations += [CommitOperationDelete(p) for p in gone]
            done = HfApi().create_commit(repo, operations, commit_message=message, parent_commit=tree.head)
            size = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in changed.values())
            return Commit(done.oid, _url(repo, done.oid), tuple(sorted(changed)), tuple(gone), size)
        except HubError:
            raise
        except Exception as error:
            # 412: the head moved. Anything passing: the next attempt begins by looking at what arrived.
            if not _may_pass(error):
                raise _explained(repo, error) from None
            problem = error
    raise _explained(repo, problem)


def _ours(repo: str, tree: Tree) -> set[str]:
    """Files that earlier releases put there, by the lineage of the last one."""
    from huggingface_hub import hf_hub_download

    if LINEAGE not in tree.files:
        return set()
    try:
        lineage = json.loads(Path(hf_hub_download(repo, LINEAGE, revision=tree.head)).read_text(encoding="utf-8"))
        return {LINEAGE} | {path for path in (*lineage["files"], *lineage["documents"]) if isinstance(path, str)}
    except (ValueError, KeyError, TypeError):
        return set()  # not readable as ours: then nothing there is ours to delete


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code if error.response is not None else 500
        return code in (408, 412, 429) or code >= 500
    return is_unreachable(error)


def _explained(repo: str, error: Exception | None) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        if error is not None and not _may_pass(error):
            return error  # ours: a bug keeps its traceback
        return HubError(f"{repo}: the Hub could not be reached ({_say(error)}); run again to publish what is missing")
    code = error.response.status_code if error.response is not None else None
    if code == 401:
        return HubError(f"{repo}: the Hub refuses this token; log in again with: hf auth login")
    if code == 403:
        return HubError(f"{repo}: this token may not write there; use one that may")
    if code == 412:
        return HubError(f"{repo}: others kept committing to it; run again to publish")
    return HubError(f"{repo}: {_say(error)}; run again to publish what is missing")


def _say(error: Exception | None) -> str:
    return redact(" ".join(str(error).split())[:200])


def _url(repo: str, oid: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/tree/{oid}"
