"""The files of a repository at a commit, and comparing them with what they should be."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.system.files import Digest, sha256

LINEAGE = "tunepress.json"
CARD = "README.md"


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine, and the sha256 of its content."""

    path: Path
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, known: Digest | None = None) -> LocalFile:
        """Return the file at `path`. It is read only if it changed since `known` was made."""
        state = path.stat()
        if known and (known.size, known.mtime_ns) == (state.st_size, state.st_mtime_ns):
            return cls(path, known.size, known.sha256)
        return cls(path, state.st_size, _digest(path, state.st_size, state.st_mtime_ns))


@dataclass(frozen=True)
class Copy:
    """The content of a file at another commit of the same repository."""

    revision: str
    path: str
    file: RemoteFile


Content = LocalFile | bytes | Copy


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: `sha256` for LFS files, the sha1 of the git blob for others."""

    size: int
    blob: str
    sha256: str | None

    def holds(self, content: Content) -> bool:
        """Return True if the content is the same. A local file is read only if git holds one of the same size."""
        if isinstance(content, Copy):
            return (self.blob, self.sha256) == (content.file.blob, content.file.sha256)
        if size_of(content) != self.size:
            return False
        if self.sha256:
            return digest(content) == self.sha256
        data = content if isinstance(content, bytes) else content.path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.blob


@dataclass(frozen=True)
class Lineage:
    """The parts of a `tunepress.json` that say whose release it belongs to, and which files that has.

    `run` is None if the file is not a readable lineage.
    """

    run: str | None = None
    mirror_of: str | None = None
    paths: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, content: bytes) -> Lineage:
        """Return the lineage in a file; an empty one if the file is not readable as a lineage."""
        try:
            told = json.loads(content)
            paths = [path for path in (*told["files"], *told["documents"]) if isinstance(path, str)]
            run, mirror_of = (told.get(key) if isinstance(told.get(key), str) else None for key in ("run", "mirror_of"))
            return cls(run, mirror_of, frozenset([LINEAGE, *paths]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()


@dataclass(frozen=True)
class Tree:
    """The files of a repository at a commit."""

    repo: str
    head: str
    files: dict[str, RemoteFile]

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file, or None if it does not exist."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if path not in self.files:
            return None
        # Not through the cache: it turns an unreachable Hub into a file that is not there.
        answer = get_session().get(hf_hub_url(self.repo, path, revision=self.head), headers=build_hf_headers())
        hf_raise_for_status(answer)
        return answer.content

    @functools.cached_property
    def lineage(self) -> Lineage:
        """Return the lineage of the last release, or an empty one."""
        return Lineage.parse(self.read(LINEAGE) or b"")

    @property
    def ours(self) -> frozenset[str]:
        """Return the files that releases put there, by the lineage of the last one."""
        return self.lineage.paths & self.files.keys()


def read_tree(repo: str, revision: str | None = None) -> Tree:
    """Return the files of a repository at the head of its main branch, or at a branch, tag, commit or pull request."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    head = str(api.model_info(repo, revision=revision).sha)
    items = api.list_repo_tree(repo, recursive=True, revision=head)
    files = {
        i.path: RemoteFile(i.size, i.blob_id, i.lfs.sha256 if i.lfs else None) for i in items if isinstance(i, RepoFile)
    }
    return Tree(repo, head, files)


def size_of(content: LocalFile | bytes) -> int:
    """Return the size of a content in bytes."""
    return len(content) if isinstance(content, bytes) else content.size


def digest(content: LocalFile | bytes) -> str:
    """Return the sha256 of a content, in hex."""
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content.sha256


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """Return the sha256 of a file, computed once while the file does not change."""
    return sha256(path)
