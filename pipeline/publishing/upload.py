"""The upload of large files to the Hub, before the commit that names them.

Files are sent in batches. A file that has arrived is not sent again, even if the commit or this process fails:
the Hub is asked first whether it has the content.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.hub.retry import retry_or_explain
from pipeline.hub.tree import LocalFile, digest, size_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

BATCH_BYTES = 32_000_000  # small files go together, up to this
WATCH_SECONDS = 0.5
THREADS = 4

Progress = Callable[[int, int, str], None]


def send(
    repo: str, contents: Mapping[str, LocalFile | bytes], revision: str | None, create_pr: bool, progress: Progress
) -> list[CommitOperationAdd]:
    """Upload the files that belong into large file storage, each content once.

    Returns:
        The operations of a commit that add all of `contents`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = {p: CommitOperationAdd(p, c if isinstance(c, bytes) else str(c.path)) for p, c in contents.items()}
    for path, operation in operations.items():
        operation.upload_info.sha256 = bytes.fromhex(digest(contents[path]))
    first = {operation.upload_info.sha256: path for path, operation in reversed(operations.items())}
    once = {path: size_of(contents[path]) for path in contents if path in first.values()}
    total, done, files = sum(once.values()), 0, 0
    for batch in _batches(once):
        text = f"sending to {repo}, {batch[0]} ({files + 1} of {len(once)})"
        progress(done, total, text)
        upload = functools.partial(
            HfApi().preupload_lfs_files,
            repo,
            [operations[path] for path in batch],
            revision=revision,
            create_pr=create_pr,
            num_threads=THREADS,
            free_memory=False,
        )
        local = [c.path for path in batch if isinstance(c := contents[path], LocalFile)]
        with _watched(local, functools.partial(_tell, progress, done, total, text)):
            # Either way of uploading turns a broken connection into a RuntimeError.
            retry_or_explain(repo, upload, advice="run again to publish what is missing", also_retried=(RuntimeError,))
        done, files = done + sum(once[path] for path in batch), files + len(batch)
    progress(total, total, f"sending to {repo}, {len(once)} files are there")
    return list(operations.values())


def _tell(progress: Progress, done: int, total: int, text: str, read: int) -> None:
    progress(done + read, total, text)


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    for path, size in sizes.items():
        if batch and sum(sizes[p] for p in batch) + size > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(path)
    if batch:
        yield batch


@contextlib.contextmanager
def _watched(paths: Collection[Path], tell: Callable[[int], None]) -> Iterator[None]:
    """Call `tell` at intervals with the number of bytes that were read of these files to send them.

    The client's own bars draw on a terminal only. If the system does not tell the position in an open file, the
    number stays 0.
    """
    stop, read = threading.Event(), dict.fromkeys((str(p.resolve()) for p in paths), 0)

    def watch() -> None:
        while not stop.wait(WATCH_SECONDS):
            for path, position in _open_files():
                if path in read:
                    read[path] = max(read[path], position)
            tell(sum(read.values()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _open_files() -> Iterator[tuple[str, int]]:
    """Yield (path, position in bytes) of each file that this process has open, if the system tells."""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError, ValueError):
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                state = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
                yield path, int(state.split(maxsplit=2)[1])
