"""A forwarder killed by SIGKILL at any moment: every record arrives once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.support.mlflow_server import MlflowServer, MlflowStore
from tests.support.server_process import eventually
from tests.support.trackio_server import Run, assert_once_each, configuration, stored_rows
from tests.support.wandb_server import KEY, WandbServer

# Training from the step in argv, faster than a real run, until it is killed.
_WORK = """
import json, sys, time
from pathlib import Path
from tests.support.trackio_server import Run, configuration
folder, track, first = sys.argv[1:]
run = Run(Path(folder), configuration(**json.loads(track)))
forwarder = run.forwarder()
forwarder.forward()
print("ready", flush=True)
for step in range(int(first), 100000):
    run.train(step, step)
    forwarder.forward()
    time.sleep(0.003)
"""

_CLOSE = """
import json, sys
from pathlib import Path
from tests.support.trackio_server import Run, configuration
folder, track = sys.argv[1:]
forwarder = Run(Path(folder), configuration(**json.loads(track))).forwarder(close_seconds=90)
forwarder.close()
assert forwarder.problem is None, forwarder.problem
"""


@pytest.mark.parametrize("place", ["local", "server"])
def test_every_record_is_stored_once_after_kills_at_any_moment(place, request, tmp_path):
    server = request.getfixturevalue("server") if place == "server" else None
    folder = server.folder if server else tmp_path / "trackio"
    track = {"server": server.url} if server else {}
    records = _kill_three_times(tmp_path / "run", track, lambda: len(stored_rows(folder, "tests")), TRACKIO_DIR=folder)
    rows = stored_rows(folder, "tests")
    assert_once_each(rows, records)
    assert len({r["run_id"] for r in rows}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", [MlflowStore, MlflowServer, WandbServer])
def test_other_trackers_store_every_record_once_after_kills_at_any_moment(place, request, tmp_path):
    if place is WandbServer:
        board = WandbServer()
    else:
        board = place(tmp_path / "mlflow", request.getfixturevalue("empty_mlflow"))
    if place is not MlflowStore:
        board.start()
        request.addfinalizer(board.stop)
    records = _kill_three_times(tmp_path / "run", board.track, board.count, WANDB_API_KEY=KEY)
    board.assert_once_each(records)


def _kill_three_times(folder: Path, track: dict, count: Callable[[], int], **more: object) -> list[dict]:
    """Kill a forwarder while it sends, three times, then send the rest; return the records of the spool."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)} | {key: str(value) for key, value in more.items()}
    run, chance = Run(folder, configuration()), random.Random(str(track.keys()))
    for _ in range(3):
        before = count()
        step = max((r.get("step", 0) for r in run.records()), default=0) + 1 if run.spool.exists() else 1
        command = [sys.executable, "-c", _WORK, str(run.folder), json.dumps(track), str(step)]
        worker = subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert worker.stdout.readline() == b"ready\n"
        eventually(lambda before=before: count() > before, seconds=60)
        time.sleep(chance.uniform(0, 0.7))
        worker.kill()
        worker.wait()
    command = [sys.executable, "-c", _CLOSE, str(run.folder), json.dumps(track)]
    subprocess.run(command, env=env, cwd=REPOSITORY, check=True)
    return run.records()
