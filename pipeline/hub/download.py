"""Downloads from one repository on the Hub at one commit, with progress in bytes and errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import HubError, ModelError, UserError, is_unreachable
from pipeline.hub.client import OFFLINE, is_offline
from pipeline.hub.retry import retry, say
from pipeline.system.command_names import login, other_token
from pipeline.system.files import sync


@dataclass(frozen=True)
class Snapshot:
    """A downloaded folder, the names of its files, and their commit."""

    folder: Path
    names: tuple[str, ...]
    revision: str


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a model's repository at a commit. If the Hub is switched off, those that its cache has.

    Attributes:
        sizes: bytes of each file by path; 0 if they were not asked for.
        folder: the folder of the commit in the Hub's cache, if the Hub is switched off.
    """

    repo: str
    revision: str
    sizes: dict[str, int]
    folder: Path | None = None

    def path(self, name: str, bar: type | None = None) -> Path:
        """Return a file of the repository in the Hub's cache; it is downloaded if needed.

        Args:
            bar: class of the progress bar, such as that of `meter`.

        Raises:
            HubError: if the Hub is switched off, and the cache does not have the file.
        """
        from huggingface_hub import hf_hub_download

        if self.folder is None:
            return Path(
                str(retry(self.repo, partial(hf_hub_download, self.repo, name, revision=self.revision, tqdm_class=bar)))
            )
        if name not in self.sizes:
            raise HubError(f"{self.repo}: {name} is not in the Hub's cache{OFFLINE}")
        return self.folder / name


def remote_files(repo: str, revision: str | None = None, with_sizes: bool = True) -> RemoteFiles:
    """Return the files of a model's repository. If the Hub is switched off, its cache is read instead.

    Args:
        revision: branch, tag or commit; by default the head of the main branch.

    Raises:
        HubError: if the Hub is switched off, and the cache has no such model. Other errors are those of the client.
    """
    from huggingface_hub import HfApi

    if is_offline():
        return _cached_files(repo, revision)
    info = retry(repo, lambda: HfApi().model_info(repo, revision=revision, files_metadata=with_sizes))
    return RemoteFiles(repo, str(info.sha), {s.rfilename: s.size or 0 for s in info.siblings or []})


def _cached_files(repo: str, revision: str | None) -> RemoteFiles:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    ref = cache / "refs" / (revision or constants.DEFAULT_REVISION)
    # The client notes branches only. What was fetched by its commit, as by tunepress, has no note.
    by_age = sorted((cache / "snapshots").glob("*"), key=lambda folder: folder.stat().st_mtime)
    commit = ref.read_text().strip() if ref.is_file() else revision or (by_age[-1].name if by_age else "")
    folder = cache / "snapshots" / commit
    if not commit or not folder.is_dir():
        raise HubError(
            f"{repo}: {f'revision {revision!r}' if revision else 'the model'} is not in the Hub's cache{OFFLINE}"
        )
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return RemoteFiles(repo, commit, {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}, folder)


def download(
    repo: str,
    choose: Callable[[RemoteFiles], list[str]],
    revision: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Snapshot:
    """Download files of a model's repository into the Hub's cache, except for those that are there already.

    Args:
        choose: picks from the repository's files; may raise to refuse the repository.
        revision: branch, tag or commit; by default the head of the main branch.
        on_progress: called with bytes done and bytes in all.

    Raises:
        ModelError: if the repository or the revision is not there, or is not for this user.
        HubError: if the Hub cannot be reached, or is switched off and its cache lacks a file.
    """
    with in_one_line(repo, revision, "not a folder here, and the Hub could not be read"):
        files = remote_files(repo, revision, with_sizes=on_progress is not None)
        chosen = choose(files)
        check_names(repo, chosen)
        folder, done, total = Path(), 0, sum(files.sizes.get(name, 0) for name in chosen)
        for name in chosen:
            bar = meter(partial(_tell, on_progress, done, total)) if on_progress else None
            path = files.path(name, bar)
            sync(path)  # the client leaves that to the system, and never looks into a file that it has
            done += files.sizes[name]
            folder = path.parents[name.count("/")]
    return Snapshot(folder, tuple(chosen), files.revision)


def _tell(on_progress: Callable[[int, int], None], before: int, total: int, fresh: int) -> None:
    on_progress(before + fresh, total)


def check_names(repo: str, names: Iterable[str]) -> None:
    """Raise an error if a repository has a file that would lie outside its folder.

    Raises:
        ModelError: naming it.
    """
    for name in names:
        if not all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in name.split("/")):
            raise ModelError(f"{repo}: unsafe file name ({name!r}); nothing is downloaded. Try: another model")


@contextmanager
def in_one_line(repo: str, revision: str | None, what: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one line; `what` is the problem if no more is known.

    Raises:
        ModelError: if the repository or the revision is not there, or is not for this user.
        HubError: if the Hub cannot be reached, or its answer cannot be kept.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        then = "as the user of your token" if get_token() else f"then {login()}"
        raise ModelError(f"{repo}: gated. Try: accept its terms on the Hub, {then}") from None
    except RevisionNotFoundError:
        raise ModelError(f"{repo}: no such revision ({revision!r}). Try: another revision") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{repo}: no such model on the Hub, or it is private. Try: {other_token()}") from None
    except UnicodeEncodeError:  # nothing but the token goes into a header as it is
        raise HubError(f"{repo}: the Hub token contains invalid characters. Try: {other_token()}") from None
    except Exception as error:
        if is_offline() and is_unreachable(error):
            raise HubError(f"{repo}: the Hub is needed{OFFLINE}") from None
        if not (isinstance(error, (HfHubHTTPError, OSError)) or is_unreachable(error)):
            raise
        raise HubError(f"{repo}: {what} ({say(error)})") from None


def meter(tell: Callable[[int], None]) -> type:
    """Return a progress bar class for the Hub's client that draws nothing, and tells the bytes received so far."""
    from tqdm import tqdm

    class Meter(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._come = options.get("initial") or 0
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self._come += n or 0
            tell(int(self._come))

    return Meter
