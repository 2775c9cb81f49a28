"""What a repository holds at a commit, and whether that is what it should hold."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import sha256

LINEAGE = "tunepress.json"
CARD = "README.md"


@dataclass(frozen=True)
class Copy:
    """The content of a file as it is at another commit of the same repository."""

    revision: str
    path: str
    file: RemoteFile


Content = Path | bytes | Copy


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub knows it: `sha256` for LFS files, the git blob's sha1 for the others."""

    size: int
    blob: str
    sha256: str | None

    def holds(self, content: Content) -> bool:
        """Is this the same content? Hashes only where the size agrees."""
        if isinstance(content, Copy):
            return (self.blob, self.sha256) == (content.file.blob, content.file.sha256)
        if size_of(content) != self.size:
            return False
        if self.sha256:
            return digest(content) == self.sha256
        data = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.blob


@dataclass(frozen=True)
class Tree:
    """A repository's files at a commit."""

    repo: str
    head: str
    files: dict[str, RemoteFile]

    def read(self, path: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if path not in self.files:
            return None
        # Not through the cache: it turns an unreachable Hub into a file that is not there.
        answer = get_session().get(hf_hub_url(self.repo, path, revision=self.head), headers=build_hf_headers())
        hf_raise_for_status(answer)
        return answer.content

    @functools.cached_property
    def ours(self) -> frozenset[str]:
        """Files here that releases put there, by the lineage of the last one."""
        lineage = self.read(LINEAGE)
        return frozenset(_own_paths(lineage) & self.files.keys() if lineage is not None else ())


def _own_paths(lineage: bytes) -> set[str]:
    """What a lineage lists as ours; nothing, where it is not readable as one of ours."""
    try:
        content = json.loads(lineage)
        return {LINEAGE} | {path for path in (*content["files"], *content["documents"]) if isinstance(path, str)}
    except (ValueError, KeyError, TypeError):
        return set()


def read_tree(repo: str, revision: str | None = None) -> Tree:
    """The files of a repository at the head of its main branch, or at another branch, tag, commit or pull request."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    head = api.model_info(repo, revision=revision).sha
    items = api.list_repo_tree(repo, recursive=True, revision=head)
    files = {
        i.path: RemoteFile(i.size, i.blob_id, i.lfs.sha256 if i.lfs else None) for i in items if isinstance(i, RepoFile)
    }
    return Tree(repo, head, files)


def size_of(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def digest(content: Path | bytes) -> str:
    """The sha256 of a content; that of a file that did not change is computed once."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    state = content.stat()
    return _digest(content, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)
