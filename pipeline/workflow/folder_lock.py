"""The lock that keeps other processes out of the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import WorkspaceError

LOCK_SECONDS = 0.2  # `is_locked` holds the lock for a moment


@contextmanager
def locked(lock_path: Path, folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder.

    Args:
        lock_path: the file of the lock; its folder is made.
        folder: of the run, for messages.

    Raises:
        WorkspaceError: if another process uses the folder, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    root, lock = lock_path.parent, FileLock(lock_path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise WorkspaceError(f"{folder}: in use by another tunepress. Try: wait until it ends") from None
    except OSError as error:
        raise WorkspaceError(f"{root}: cannot be written ({error.strerror})") from None
    with lock:
        lock.release()  # `with` acquired it a second time
        yield


def is_locked(lock_path: Path) -> bool:
    """Return True if another process holds the lock."""
    from filelock import FileLock, Timeout

    if not lock_path.exists():
        return False
    try:
        with FileLock(lock_path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder in which nothing can be written
        return False
