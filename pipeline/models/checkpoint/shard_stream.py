"""A checkpoint on the Hub that is read while it is downloaded: each shard is read once, then removed.

Headers come first, by ranges, so that everything is planned and checked before the first shard arrives. One shard is
read while the next is downloaded: there are never more than two.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from pipeline.errors import CheckpointError
from pipeline.hub.download import in_one_line, meter
from pipeline.hub.retry import retry
from pipeline.models.checkpoint import Checkpoint, TensorInfo, check_header, header_length, read_header, shard_files
from pipeline.system.files import empty_folder, sha256

SHARDS_AT_A_TIME = 2
FIRST_BYTES = 100_000  # of a file, in which most headers end


class Abandoned(Exception):
    """The end of waiting for shards that nobody reads any more."""


@dataclass
class _Shard:
    """A file on the Hub, and how much of it is still unread."""

    name: str
    size: int
    sha256: str | None
    left: int = 0  # bytes of tensors
    seen: set[tuple[int, int]] = field(default_factory=set)
    is_there: threading.Event = field(default_factory=threading.Event)


class PassingCheckpoint(Checkpoint):
    """A checkpoint whose tensors can be read once each, in the order of its shards, from any number of threads.

    Args:
        repo, revision: a model on the Hub, at a commit.
        folder: where its index lies, if it has one.
        scratch: a folder for the shards; made, and removed at the end.
        on_progress: called, in a thread, with bytes fetched and bytes in all.

    Use as a context manager: entering begins to fetch, leaving ends it and takes away what is left.

    Raises:
        CheckpointError: if a header is none, the index names what is not there, or what came is not what
            was announced; by reading, too.
        HubError: if the Hub cannot be reached, or breaks off; by reading, too.
    """

    def __init__(self, repo: str, revision: str, folder: Path, scratch: Path, on_progress: Callable[[int, int], None]):
        from huggingface_hub import HfApi

        self._repo, self._revision, self._scratch, self._on_progress = repo, revision, scratch, on_progress
        with in_one_line(repo, revision, "the headers of its shards could not be read"):
            info = retry(repo, lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
            found = info.siblings or []
            remote = {s.rfilename: _Shard(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None) for s in found}
            expected = shard_files(folder, lambda path: path.name in remote)
            self._shards = {scratch / path.name: remote[path.name] for path in sorted(expected)}
            names = {scratch / path.name: tensors for path, tensors in expected.items()}
            self._open(names, lambda path: check_header(path, self._first_bytes(path), self._shards[path].size))
        for tensor in self.values():
            self._shards[tensor.path].left += tensor.nbytes
        self.file_bytes = sum(shard.size for shard in self._shards.values())
        self._room = threading.Semaphore(SHARDS_AT_A_TIME)
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._fetch_all, name="shards", daemon=True)

    def __enter__(self) -> PassingCheckpoint:
        empty_folder(self._scratch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()
        self._thread.join()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def abandon(self) -> None:
        """Stop the download and release threads that wait for a shard."""
        self._fail(Abandoned())

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._room.release()
        for shard in self._shards.values():
            shard.is_there.set()

    def _bytes(self, info: TensorInfo, offset: int, count: int) -> torch.Tensor:
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        shard = self._shards[info.path]
        shard.is_there.wait()
        if self._failure:
            raise self._failure
        data = super()._bytes(info, offset, count)
        with self._lock:
            if (offset, count) not in shard.seen:
                shard.seen.add((offset, count))
                shard.left -= count
                if not shard.left:
                    info.path.unlink()
                    self._room.release()
        return data

    def _fetch_all(self) -> None:
        done = 0
        try:
            for path, shard in self._shards.items():
                if not shard.left:  # it has no tensors
                    continue
                self._room.acquire()
                self._fetch(path, shard, done)
                done += shard.size
                shard.is_there.set()
        except BaseException as error:  # noqa: BLE001 - it is raised where the shard is wanted
            self._fail(error)

    def _fetch(self, path: Path, shard: _Shard, before: int) -> None:
        from huggingface_hub import hf_hub_download

        def tell(fresh: int) -> None:
            if self._failure:
                raise self._failure
            self._on_progress(before + fresh, self.file_bytes)

        tell(0)
        with in_one_line(self._repo, self._revision, f"{shard.name} could not be fetched"):
            bar, fetch = meter(tell), partial(hf_hub_download, revision=self._revision, local_dir=self._scratch)
            retry(self._repo, lambda: fetch(self._repo, shard.name, tqdm_class=bar))
        announced = {name: info for name, info in self.items() if info.path == path}
        if (shard.sha256 and sha256(path) != shard.sha256) or read_header(path)[0] != announced:
            raise CheckpointError(f"{self._repo}: {shard.name} is not the file that the Hub announced; fetch it again")

    def _first_bytes(self, path: Path) -> bytes:
        """Return a shard's header, with the eight bytes before it."""
        shard = self._shards[path]
        head = self._range(shard.name, 0, min(FIRST_BYTES, shard.size))
        end = 8 + header_length(path, head, shard.size)
        return head if end <= len(head) else head + self._range(shard.name, len(head), end)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if start >= stop:
            return b""
        url = hf_hub_url(self._repo, name, revision=self._revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

        def attempt() -> bytes:
            response = get_session().get(url, headers=headers)
            hf_raise_for_status(response)
            return response.content

        return retry(self._repo, attempt)
