"""Work in blocks of rows: each row once, bounded threads, and the first error raised."""

import threading
import time

import pytest
import torch

from pipeline.models.checkpoint import row_blocks as blocks
from pipeline.models.checkpoint.row_blocks import in_parallel, row_blocks, tiles


@pytest.mark.parametrize("rows, row_bytes", [(10, 3), (10, 100), (1, 1), (0, 8), (7, 0), (100, 1)])
@pytest.mark.parametrize("together", [1, 4, 1000])
def test_blocks_and_tiles_cover_every_row_once_in_order(monkeypatch, rows, row_bytes, together):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 25)
    monkeypatch.setattr(blocks, "TILE_ELEMENTS", 25)
    for cut in (row_blocks(rows, row_bytes, together), tiles(rows, row_bytes, together)):
        spans = list(cut)
        assert [row for first, stop in spans for row in range(first, stop)] == list(range(rows))
        assert all(first % together == 0 for first, _ in spans)
        assert all(stop - first <= max(together, 25 // max(row_bytes, 1)) for first, stop in spans)


def test_every_job_is_done_once_and_progress_ends_at_the_total():
    done, seen = [], []
    jobs = [lambda number=number: done.append(number) or number for number in range(50)]
    in_parallel(jobs, sum(range(50)), lambda d, t: seen.append((d, t)), threads=4)
    assert sorted(done) == list(range(50))
    assert seen == sorted(seen) and len(seen) == 50 and seen[-1] == (1225, 1225)


def test_jobs_run_at_the_same_time_and_no_more_of_them_than_threads():
    running, most, lock, both = [0], [0], threading.Lock(), threading.Barrier(2, timeout=60)

    def job():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait()  # which ends only if another thread comes as well
        with lock:
            running[0] -= 1
        return 1

    in_parallel([job] * 20, 20, threads=2)
    assert most[0] == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_ends_it_and_no_thread_goes_on(threads):
    taken, before = [], threading.active_count()

    def jobs():
        for number in range(1000):
            taken.append(number)
            yield lambda number=number: 1 if number < 5 else 1 // 0

    with pytest.raises(ZeroDivisionError):
        in_parallel(jobs(), 1000, threads=threads)
    assert threading.active_count() == before
    assert len(taken) < 20


def test_an_error_while_jobs_are_made_is_raised_as_well():
    def jobs():
        yield lambda: 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        in_parallel(jobs(), 10)


def test_what_interrupts_the_caller_stops_the_threads():
    before, count = threading.active_count(), []

    def job():
        time.sleep(0.01)
        count.append(1)
        return 1

    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_parallel([job] * 1000, 1000, interrupted)
    assert threading.active_count() == before and len(count) < 100


def test_interrupt_while_threads_are_started_is_raised_as_it_is(monkeypatch):
    before, start = threading.active_count(), threading.Thread.start

    def interrupted(worker):
        if threading.active_count() > before:
            raise KeyboardInterrupt
        start(worker)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_parallel([lambda: time.sleep(0.05) or 1] * 10, 10, threads=3)
    assert threading.active_count() == before


@pytest.mark.parametrize("fails", [False, True])
def test_each_thread_computes_alone_and_torch_gets_its_threads_back(fails):
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)

        def job():
            seen.append(torch.get_num_threads())
            return 1 // (not fails)

        try:
            in_parallel([job] * 4, 4, threads=2)
        except ZeroDivisionError:
            assert fails
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
