"""Downloads from one repository on the Hub at one commit, with progress in bytes and errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import HubError, ModelError, UserError, is_unreachable
from pipeline.hub.retry import retry, say
from pipeline.system.command_names import login, other_token
from pipeline.system.files import sync


@dataclass(frozen=True)
class Snapshot:
    """A downloaded folder, the names of its files, and their commit."""

    folder: Path
    names: tuple[str, ...]
    revision: str


def download(
    repo: str,
    choose: Callable[[list[str]], list[str]],
    revision: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Snapshot:
    """Download files of a model's repository into the Hub's cache, except for those that are there already.

    Args:
        choose: picks from the repository's file names; may raise to refuse the repository.
        revision: branch, tag or commit; by default the head of the main branch.
        on_progress: called with bytes done and bytes in all.

    Raises:
        ModelError: if the repository or the revision is not there, or is not for this user.
        HubError: if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with in_one_line(repo, revision, "not a folder here, and the Hub could not be read"):
        files_metadata = on_progress is not None
        info = retry(repo, lambda: HfApi().model_info(repo, revision=revision, files_metadata=files_metadata))
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        chosen = choose(list(sizes))
        check_names(repo, chosen)
        folder, done, total = Path(), 0, sum(sizes[name] for name in chosen)
        for name in chosen:
            bar = meter(partial(_tell, on_progress, done, total)) if on_progress else None
            fetch = partial(hf_hub_download, repo, name, revision=info.sha, tqdm_class=bar)
            path = Path(str(retry(repo, fetch)))
            sync(path)  # the client leaves that to the system, and never looks into a file that it has
            done += sizes[name]
            folder = path.parents[name.count("/")]
    return Snapshot(folder, tuple(chosen), str(info.sha))


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
