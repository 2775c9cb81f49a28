"""Work on a checkpoint in blocks of rows, spread over the cores.

Each thread reads a block, computes, and writes its result. The arithmetic of one thread runs beside the reading and
writing of another, because torch and the system calls release the interpreter. There are as many blocks in memory as
threads, and none waits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.system.hardware import cores

# Bytes of a weight that are read at a time: long enough for a disk, and a small part of any memory.
BLOCK_BYTES = 4_000_000
# Weights computed with at a time: few enough that what arithmetic leaves on its way stays in a cache, and so
# many that the interpreter, in which threads take turns, has little to do.
TILE_ELEMENTS = 512 * 1024

Job = Callable[[], int]  # does its part, and returns how many bytes of the source that was
Take = Callable[[str, torch.Tensor, int], None]  # a tensor's name, some of its rows, and the number of the first


def in_disk_order(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors in the order of their bytes on disk."""
    return sorted(checkpoint, key=lambda name: (checkpoint[name].path, checkpoint[name].offset))


def blocks_of(checkpoint: Checkpoint, name: str, take: Take, together: int = 1) -> Iterator[Job]:
    """Yield a job for every block of a tensor, which reads it and passes it to `take`; a scalar is one block."""
    info = checkpoint[name]
    for span in row_blocks(info.shape[0], info.row_bytes, together) if info.shape else [None]:
        yield partial(_hand_over, checkpoint, name, span, take)


def _hand_over(checkpoint: Checkpoint, name: str, span: tuple[int, int] | None, take: Take) -> int:
    rows = checkpoint.read_rows(name, *span) if span else checkpoint.read(name)
    take(name, rows, span[0] if span else 0)
    return rows.nbytes


def row_blocks(rows: int, row_bytes: int, together: int = 1) -> Iterator[tuple[int, int]]:
    """Yield first row and stop row of each block of a stored tensor, at least `together` rows each."""
    return _spans(rows, BLOCK_BYTES // max(row_bytes, 1), together)


def tiles(rows: int, width: int, together: int = 1) -> Iterator[tuple[int, int]]:
    """Yield first row and stop row of each tile of a matrix of `rows` by `width` in memory."""
    return _spans(rows, TILE_ELEMENTS // max(width, 1), together)


def _spans(rows: int, wanted: int, together: int) -> Iterator[tuple[int, int]]:
    step = max(1, wanted // together) * together
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def are_finite(rows: torch.Tensor) -> bool:
    """Return True if every value is finite. Minimum and maximum show it: NaN wins every comparison."""
    return not rows.numel() or bool(torch.stack(torch.aminmax(rows)).isfinite().all())


def in_parallel(
    jobs: Iterable[Job],
    total: int,
    on_progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    on_end: Callable[[], None] | None = None,
) -> None:
    """Run every job in one of as many threads as there are cores; the first error stops all and is raised.

    Args:
        jobs: taken one at a time, in order, as threads come free.
        total: bytes that all jobs will have done.
        on_progress: called from the caller's thread with bytes done and `total`.
        on_end: called when no more jobs are begun, to let go of those that wait for something.

    torch computes with one thread in each of these, since the work is spread already.
    """
    pending, lock, stop = iter(jobs), threading.Lock(), threading.Event()
    reports: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    job = next(pending, None)
                if job is None:
                    break
                reports.put(job())
        except BaseException as error:  # noqa: BLE001 - it is raised again in the caller's thread
            stop.set()
            reports.put(error)
        finally:
            reports.put(None)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # which threads that begin from here on take over
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads or cores())]
    running, done, failure = len(workers), 0, None
    try:
        for worker in workers:
            worker.start()
        while running:
            report = reports.get()
            if report is None:
                running -= 1
            elif isinstance(report, BaseException):
                failure = failure or report
                if on_end:
                    on_end()
            else:
                done += report
                if on_progress:
                    on_progress(done, total)
    finally:
        stop.set()  # for what ends this from the caller's side, such as Ctrl-C
        if on_end:
            on_end()
        for worker in workers:
            if worker.is_alive():  # not before it is started, which an interrupt can prevent
                worker.join()
        torch.set_num_threads(before)
    if failure is not None:
        raise failure
