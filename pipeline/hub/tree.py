"""What a repository holds at a commit, and whether that is what it should hold."""

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
    """A file on this machine, and the sha256 of what it holds."""

    path: Path
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, known: Digest | None = None) -> LocalFile:
        """The file at `path`, which is read only where it is not as it was when `known` was made."""
        state = path.stat()
        if known and (known.size, known.mtime_ns) == (state.st_size, state.st_mtime_ns):
            return cls(path, known.size, known.sha256)
        return cls(path, state.st_size, _digest(path, state.st_size, state.st_mtime_ns))


@dataclass(frozen=True)
class Copy:
    """The content of a file as it is at another commit of the same repository."""

    revision: str
    path: str
    file: RemoteFile


Content = LocalFile | bytes | Copy


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub knows it: `sha256` for LFS files, the git blob's sha1 for the others."""

    size: int
    blob: str
    sha256: str | None

    def holds(self, content: Content) -> bool:
        """Is this the same content? A file is read only where the Hub has it in git itself, and in the same size."""
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
    """What of a `tunepress.json` says whose release it belongs to, and which files that has.

    `run` is None where it is not readable as one of ours, and says nothing.
    """

    run: str | None = None
    mirror_of: str | None = None
    paths: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, content: bytes) -> Lineage:
        try:
            told = json.loads(content)
            paths = [path for path in (*told["files"], *told["documents"]) if isinstance(path, str)]
            run, mirror_of = (told.get(key) if isinstance(told.get(key), str) else None for key in ("run", "mirror_of"))
            return cls(run, mirror_of, frozenset([LINEAGE, *paths]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()


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
    def lineage(self) -> Lineage:
        """What the last release here says of itself; empty where there is none."""
        return Lineage.parse(self.read(LINEAGE) or b"")

    @property
    def ours(self) -> frozenset[str]:
        """Files here that releases put there, by the lineage of the last one."""
        return self.lineage.paths & self.files.keys()


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


def size_of(content: LocalFile | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.size


def digest(content: LocalFile | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content.sha256


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """The sha256 of a file; that of one that did not change is computed once."""
    return sha256(path)
