"""The location of a release: a folder, or a repository on the Hub at one commit, from which little is fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ModelError, WorkspaceError
from pipeline.hub.download import download, in_one_line
from pipeline.hub.tree import LINEAGE, Tree, read_tree
from pipeline.models.sources import local_folder
from pipeline.system.files import sha256
from pipeline.verification.lineage_claims import MOST_BYTES, Malformed, check_path
from pipeline.workflow.workspace import HIDDEN, Workspace

NOT_OURS = (HIDDEN, ".git", ".cache")  # folders beside a release: of its run, of git, of the Hub's client

Tell = Callable[[int, int, str], None]  # done, in all, what


class NoRelease(ModelError):
    """There is nothing here that tunepress published or made."""


@dataclass
class Place:
    """A release's files.

    Attributes:
        name: as it was asked for.
        folder: where files lie that are here.
        sizes: bytes of every file that is there, by path.
        run: the run that made it, where it lies here too.
        tree: of a repository.
    """

    name: str
    folder: Path
    sizes: dict[str, int]
    run: Workspace | None = None
    tree: Tree | None = None
    tell: Tell = lambda done, total, what: None
    _digests: dict[str, str] = field(default_factory=dict)

    @property
    def revision(self) -> str | None:
        return self.tree.head if self.tree else None

    def lineage(self) -> bytes:
        """The content of `tunepress.json`.

        Raises:
            NoRelease: where there is none.
            Malformed: where it is too large to be one.
        """
        if LINEAGE not in self.sizes:
            raise NoRelease(f"{self.name}: has no {LINEAGE}, so there is nothing to verify it by; tunepress writes one")
        if self.sizes[LINEAGE] > MOST_BYTES:
            raise Malformed(f"{self.sizes[LINEAGE]:,} bytes; a lineage has some ten thousand, and this was not read")
        self.bring([LINEAGE])
        return (self.folder / LINEAGE).read_bytes()

    def digest(self, path: str) -> str | None:
        """The sha256 of a file; None where it lies on the Hub alone, which tells that only of large ones."""
        if self.tree and self.tree.files[path].sha256:
            return self.tree.files[path].sha256
        return self.digest_here(path)

    def digest_here(self, path: str) -> str | None:
        """The sha256 of a file as it is on this machine; None where it is not."""
        if path not in self._digests and (self.folder / path).is_file():
            self._digests[path] = sha256(self.folder / path)
        return self._digests.get(path)

    def is_large(self, path: str) -> bool:
        """Is it one that the Hub tells the hash of, so that it can be judged before it is fetched?"""
        return self.tree is not None and self.tree.files[path].sha256 is not None

    def bring(self, paths: Collection[str]) -> None:
        """Let these files lie here; those of a repository are fetched.

        Raises:
            HubError: where the Hub does not give them.
        """
        if self.tree is None:
            return
        wanted = {path for path in paths if path in self.sizes}
        for path in wanted:
            check_path(path) if path != LINEAGE else None
        tell = lambda done, total: self.tell(done, total, "fetching")  # noqa: E731
        found = download(self.name, lambda names: [n for n in names if n in wanted], self.tree.head, tell)
        self.folder = found.folder if found.names else self.folder

    def read(self, path: str) -> bytes | None:
        """A small file that was brought; None where there is none."""
        file = self.folder / path
        return file.read_bytes() if path in self.sizes and file.is_file() else None


def open_place(source: str, revision: str | None, tell: Tell) -> Place:
    """The release that `source` names: a folder, a run's folder, or a repository.

    Raises:
        ModelError: where there is no such thing.
        HubError: where the Hub does not answer.
    """
    if folder := local_folder(source):
        if revision:
            raise ModelError(f"{source}: is a folder, which has no revisions; leave out --revision")
        run = _run_of(folder)
        release = run.release if run and run.folder == folder else folder
        return Place(source, release, _sizes(release), run, tell=tell)
    with in_one_line(source, revision, "not a folder here, and the Hub could not be read"):
        tree = read_tree(source, revision)
    return Place(source, Path(), {path: file.size for path, file in tree.files.items()}, tree=tree, tell=tell)


def _run_of(folder: Path) -> Workspace | None:
    """The run whose folder this is, or whose release lies there."""
    for run in (folder, folder / HIDDEN, folder.absolute().parent):
        try:
            workspace = Workspace.open(run)
        except WorkspaceError:
            continue
        if folder in (workspace.folder, workspace.release) or folder.samefile(workspace.release):
            return workspace
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """Every ordinary file in a folder, by its path there; folders that are links are not entered."""
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        for name in names:
            path = Path(root) / name
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found
