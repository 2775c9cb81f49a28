"""The location of a release: a folder, or a repository on the Hub at one commit."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ModelError, WorkspaceError
from pipeline.hub.client import is_offline
from pipeline.hub.download import download, in_one_line, remote_files
from pipeline.hub.tree import LINEAGE, Tree, read_tree
from pipeline.models.sources import local_folder
from pipeline.system.files import sha256
from pipeline.verification.lineage_claims import MOST_BYTES, Malformed, check_path
from pipeline.workflow.workspace import HIDDEN, Workspace

NOT_OURS = (HIDDEN, ".git", ".cache")  # folders of the run, of git, and of the Hub's client

Tell = Callable[[int, int, str], None]  # done, total, text


class NoRelease(ModelError):
    """A folder or repository without a release of tunepress."""


@dataclass
class Place:
    """The files of a release.

    Attributes:
        name: the source, as the user named it.
        folder: the folder of the files on this machine.
        sizes: bytes of every file of the release, by path.
        run: the run that made the release, if it is on this machine.
        tree: the files of a repository; None for a folder.
    """

    name: str
    folder: Path
    sizes: dict[str, int]
    run: Workspace | None = None
    tree: Tree | None = None
    tell: Tell = lambda done, total, text: None
    _digests: dict[str, str] = field(default_factory=dict)

    @property
    def revision(self) -> str | None:
        """Return the commit of a repository."""
        return self.tree.head if self.tree else None

    def lineage(self) -> bytes:
        """Return the content of `tunepress.json`.

        Raises:
            NoRelease: if there is none.
            Malformed: if it is too large.
        """
        if LINEAGE not in self.sizes:
            raise NoRelease(f"{self.name}: has no {LINEAGE}, so it is not a release of tunepress")
        if self.sizes[LINEAGE] > MOST_BYTES:
            raise Malformed(f"not read: {self.sizes[LINEAGE]:,} bytes, more than any lineage of ours")
        self.bring([LINEAGE])
        return (self.folder / LINEAGE).read_bytes()

    def digest(self, path: str) -> str | None:
        """Return the sha256 of a file; None for a small file that is only on the Hub."""
        if self.tree and self.tree.files[path].sha256:
            return self.tree.files[path].sha256
        return self.digest_here(path)

    def digest_here(self, path: str) -> str | None:
        """Return the sha256 of a file on this machine; None if it is not here."""
        if path not in self._digests and (self.folder / path).is_file():
            self._digests[path] = sha256(self.folder / path)
        return self._digests.get(path)

    def is_large(self, path: str) -> bool:
        """Return True if the Hub tells the sha256 of a file before it is downloaded."""
        return self.tree is not None and self.tree.files[path].sha256 is not None

    def bring(self, paths: Collection[str]) -> None:
        """Download these files if they are in a repository.

        Raises:
            HubError: if the download fails.
        """
        if self.tree is None:
            return
        wanted = {path for path in paths if path in self.sizes}
        for path in wanted:
            check_path(path) if path != LINEAGE else None
        tell = lambda done, total: self.tell(done, total, "downloading")  # noqa: E731
        found = download(self.name, lambda files: [n for n in files.sizes if n in wanted], self.tree.head, tell)
        self.folder = found.folder if found.names else self.folder

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file on this machine; None if it is not here."""
        file = self.folder / path
        return file.read_bytes() if path in self.sizes and file.is_file() else None


def open_place(source: str, revision: str | None, tell: Tell) -> Place:
    """Return the location of a release: a folder, a run's folder, or a repository.

    Raises:
        ModelError: if there is no such folder or repository.
        HubError: if the Hub does not answer.
    """
    if folder := local_folder(source):
        if revision:
            raise ModelError(f"{source}: a folder has no revisions. Try: without --revision")
        run = _run_of(folder)
        release = run.release if run and run.folder == folder else folder
        return Place(source, release, _sizes(release), run, tell=tell)
    with in_one_line(source, revision, "not a folder here, and the Hub could not be read"):
        if is_offline():
            cached = remote_files(source, revision)
            assert cached.folder, "the Hub is switched off, so these are files of its cache"
            return Place(source, cached.folder, cached.sizes, tell=tell)
        tree = read_tree(source, revision)
    return Place(source, Path(), {path: file.size for path, file in tree.files.items()}, tree=tree, tell=tell)


def _run_of(folder: Path) -> Workspace | None:
    """Return the run whose folder or release this is; None if there is none."""
    for run in (folder, folder / HIDDEN, folder.absolute().parent):
        try:
            workspace = Workspace.open(run)
        except WorkspaceError:
            continue
        if folder in (workspace.folder, workspace.release) or folder.samefile(workspace.release):
            return workspace
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of every ordinary file in a folder by its path, without entering linked folders."""
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        for name in names:
            path = Path(root) / name
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found
