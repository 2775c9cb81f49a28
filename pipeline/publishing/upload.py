"""Bytes on their way to the Hub, ahead of the commit that names them.

Files go a few at a time. What has arrived is not sent again, whatever becomes of the
commit or of this process: the Hub says so when it is asked about the same content.
"""

from __future__ import annotations

import contextlib
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
    """Upload what belongs into large file storage, each content once.

    Returns:
        The operations that add all of `contents`, for a commit.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = {p: CommitOperationAdd(p, c if isinstance(c, bytes) else str(c.path)) for p, c in contents.items()}
    for path, operation in operations.items():
        operation.upload_info.sha256 = bytes.fromhex(digest(contents[path]))
    first = {operation.upload_info.sha256: path for path, operation in reversed(operations.items())}
    once = {path: size_of(contents[path]) for path in contents if path in first.values()}
    total, done, files = sum(once.values()), 0, 0
    for batch in _batches(once):
        what = f"sending to {repo}, {batch[0]} ({files + 1} of {len(once)})"
        progress(done, total, what)
        chosen = [operations[path] for path in batch]
        local = [c.path for path in batch if isinstance(c := contents[path], LocalFile)]
        with _watched(local, lambda read, done=done, what=what: progress(done + read, total, what)):
            retry_or_explain(
                repo,
                lambda chosen=chosen: HfApi().preupload_lfs_files(
                    repo, chosen, revision=revision, create_pr=create_pr, num_threads=THREADS, free_memory=False
                ),
                advice="run again to publish what is missing",
                also_retried=(RuntimeError,),  # what either way of uploading makes of a connection that breaks
            )
        done, files = done + sum(once[path] for path in batch), files + len(batch)
    progress(total, total, f"sending to {repo}, {len(once)} files are there")
    return list(operations.values())


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
    """Tell now and then how many bytes of these files were read, which happens as they are sent.

    The client's own bars draw on a terminal and nowhere else. Where the system does not say
    how far an open file is read, nothing is told.
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
    """(path, position) of the files that this process has open, on systems that tell."""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError, ValueError):
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                state = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
                yield path, int(state.split(maxsplit=2)[1])
