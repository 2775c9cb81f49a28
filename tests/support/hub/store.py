"""Repositories as content-addressed state.

File contents are blobs on disk, named by their sha256. A commit is an immutable
snapshot ``{path: Entry}``; branches, tags and pull requests are names for commits.
Nothing here knows about HTTP: what a client did wrong is raised as a `HubError`,
which carries the status and the error code that the real Hub would answer.
"""

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

KINDS = ("model", "dataset", "space")
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".png", ".parquet")
LARGEST_REGULAR_FILE = 10 * 1024 * 1024

_NAME = re.compile(r"(?!.*(?:--|\.\.))(?!.*\.git$)[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REF_NAME = re.compile(r"(?!refs/)(?!.*(?:\.\.|//))[\w][\w./+-]*(?<![./])", re.ASCII)
_FORBIDDEN_PARTS = {"", ".", "..", ".git"}


class HubError(Exception):
    """A request that the Hub refuses: an HTTP status, an optional error code, a sentence."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra):
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


def check_path(path: str) -> str:
    """Return `path` if it names a file inside a repository, or refuse it with 400."""
    unsafe = not isinstance(path, str) or "\\" in path or "\0" in path
    if unsafe or any(part in _FORBIDDEN_PARTS for part in path.split("/")):
        raise HubError(400, f"Invalid path: {path!r}")
    return path


def check_ref_name(name: str) -> str:
    """Return `name` if it can name a branch or a tag, or refuse it with 400."""
    if not isinstance(name, str) or not _REF_NAME.fullmatch(name):
        raise HubError(400, f"Invalid reference name: {name!r}")
    return name


def belongs_in_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub stores this file as an LFS object: by suffix, size, or binary content."""
    if size == 0:
        return False
    return path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR_FILE or b"\0" in sample


def git_oid(content: bytes) -> str:
    """The object id that git gives a blob with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One file of a commit; `oid` is git's id of the content, or of the LFS pointer."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256, self.size))

    @property
    def etag(self) -> str:
        """What identifies the content to a client: sha256 for LFS, git's id otherwise."""
        return self.sha256 if self.lfs else self.oid

    @classmethod
    def of_lfs(cls, sha256: str, size: int) -> "Entry":
        return cls(sha256, size, git_oid(_pointer(sha256, size)), lfs=True)


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot of a repository."""

    oid: str
    parent: "Commit | None"
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]

    def history(self) -> Iterator["Commit"]:
        """This commit and its ancestors, newest first."""
        commit = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def beneath(self, path: str) -> dict[str, Entry]:
        """The file at `path`, or the files in the folder of that name."""
        return {p: entry for p, entry in self.files.items() if p == path or p.startswith(path + "/")}

    def folder_oid(self, path: str) -> str:
        """An id for the content of a folder."""
        content = [[p, entry.oid] for p, entry in self.beneath(path).items()]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def last_change(self, path: str) -> "Commit":
        """The newest commit that changed the file or the folder at `path`."""
        commit, here = self, self.beneath(path)
        while commit.parent is not None and commit.parent.beneath(path) == here:
            commit = commit.parent
        return commit


class Blobs:
    """Contents on disk, each in a file that is named by its sha256."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def read(self, sha256: str) -> bytes:
        return self.path(sha256).read_bytes()

    def write(self, chunks: Iterable[bytes], *, sha256: str | None = None, size: int | None = None) -> tuple[str, int]:
        """Store a content; 400, and nothing stored, if it is not the announced one.

        Returns the sha256 and the size of what was stored.
        """
        digest, length = hashlib.sha256(), 0
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix="incoming-")
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    length += len(chunk)
                    file.write(chunk)
            if size is not None and length != size:
                raise HubError(400, f"Size mismatch: {size} bytes announced, {length} received")
            if sha256 is not None and digest.hexdigest() != sha256:
                raise HubError(400, f"sha256 mismatch: {sha256} announced, {digest.hexdigest()} received")
            os.replace(temporary, self.path(digest.hexdigest()))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return digest.hexdigest(), length


@dataclass
class PullRequest:
    """What is known of a pull request besides its commits; `status` is open, closed or merged."""

    title: str
    author: str
    created: str
    base: Commit
    status: str = "open"


@dataclass
class Repository:
    """One repository: its commits, the names for them, and the LFS objects it holds.

    `host` is the address of a Space's program, `sdk` what that is made with, and `variables` its settings.
    Of a `gated` one, the files are for its owner alone.
    """

    kind: str
    id: str
    private: bool
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)
    discussions: dict[int, PullRequest] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    host: str | None = None
    sdk: str = "gradio"
    variables: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def page(self) -> str:
        """The path of the repository's page, as in its URL."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def resolve(self, rev: str) -> Commit:
        """The commit that a branch, tag, full reference or (shortened) commit id stands for."""
        oid = self.head(rev) or self.tags.get(rev.removeprefix("refs/tags/"))
        if oid is None and re.fullmatch("[0-9a-f]{7,40}", rev):
            matches = [known for known in self.commits if known.startswith(rev)]
            oid = matches[0] if len(matches) == 1 else None
        if oid is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return self.commits[oid]

    def head(self, rev: str) -> str | None:
        """The commit id that a branch or pull request points to; None if `rev` is neither."""
        if match := re.fullmatch(r"refs/pr/(\d+)", rev):
            return self.pull_requests.get(int(match[1]))
        return self.branches.get(rev.removeprefix("refs/heads/"))

    def move(self, rev: str, commit: Commit) -> None:
        """Point a branch or pull request at `commit`."""
        if match := re.fullmatch(r"refs/pr/(\d+)", rev):
            self.pull_requests[int(match[1])] = commit.oid
        else:
            self.branches[rev.removeprefix("refs/heads/")] = commit.oid

    def add_commit(
        self, parent: Commit | None, files: Mapping[str, Entry], *, title: str, message: str = "", author: str
    ) -> Commit:
        """Record a snapshot, without pointing any name at it yet."""
        date = now()
        content = {path: entry.oid for path, entry in sorted(files.items())}
        identity = [len(self.commits), parent and parent.oid, title, message, author, date, content]
        oid = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        snapshot = MappingProxyType(dict(sorted(files.items())))
        commit = self.commits[oid] = Commit(oid, parent, title, message, author, date, snapshot)
        return commit

    def open_pull_request(self, base: Commit, commit: Commit) -> int:
        """Propose `commit`, made from `base`; the number of the new pull request."""
        number = len(self.pull_requests) + 1
        self.pull_requests[number] = commit.oid
        self.discussions[number] = PullRequest(commit.title, commit.author, commit.date, base)
        return number

    def merge(self, number: int, author: str) -> Commit:
        """Bring what a pull request changes into main."""
        proposal, proposed = self.discussions[number], self.commits[self.pull_requests[number]].files
        head, base = self.resolve("main"), proposal.base.files
        files = {p: e for p, e in head.files.items() if p in proposed or p not in base}
        files |= {p: e for p, e in proposed.items() if base.get(p) != e}
        commit = self.add_commit(head, files, title=f"{proposal.title} (#{number})", author=author)
        self.move("main", commit)
        proposal.status = "merged"
        return commit

    def used_storage(self) -> int:
        """Bytes of all distinct contents, over the whole history."""
        entries = {entry for commit in self.commits.values() for entry in commit.files.values()}
        return sum(entry.size for entry in entries)


class Store:
    """All repositories of a hub. Hold `lock` while reading and then changing one."""

    def __init__(self, folder: Path):
        self.lock = threading.RLock()
        self.blobs = Blobs(Path(folder) / "blobs")
        self._repositories: dict[tuple[str, str], Repository] = {}

    def find(self, kind: str, repo_id: str) -> Repository | None:
        return self._repositories.get((kind, repo_id))

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> Repository:
        """Make a repository with the first commit that the Hub gives it: a .gitattributes."""
        owner, _, name = repo_id.partition("/")
        if kind not in KINDS or not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)):
            raise HubError(400, f"Invalid repository: {kind} {repo_id!r}")
        repository = self._repositories[kind, repo_id] = Repository(kind, repo_id, private, now())
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": self.add_regular(attributes.encode())}
        repository.move("main", repository.add_commit(None, files, title="initial commit", author=owner))
        return repository

    def delete(self, repository: Repository) -> None:
        del self._repositories[repository.kind, repository.id]

    def add_regular(self, content: bytes) -> Entry:
        """Store a file that goes into git itself."""
        sha256, size = self.blobs.write([content])
        return Entry(sha256, size, git_oid(content), lfs=False)

    def add_object(self, repository: Repository, chunks: Iterable[bytes], **announced) -> Entry:
        """Store an LFS object for a repository; `announced` as in `Blobs.write`."""
        sha256, size = self.blobs.write(chunks, **announced)
        with self.lock:
            repository.objects[sha256] = size
        return Entry.of_lfs(sha256, size)


def now() -> str:
    """The current time, in the form the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
