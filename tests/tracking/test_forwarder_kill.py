"""A forwarder killed by SIGKILL at any moment: every record arrives once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from tests.support import REPOSITORY
from tests.support.trackio_server import Run, assert_once_each, configuration, stored_rows

# Training from the step in argv, faster than a real run, until it is killed.
_WORK = """
import sys, time
from pathlib import Path
from tests.support.trackio_server import Run, configuration
folder, first, *server = sys.argv[1:]
run = Run(Path(folder), configuration(**({"server": server[0]} if server else {})))
forwarder = run.forwarder()
forwarder.forward()
print("ready", flush=True)
for step in range(int(first), 100000):
    run.train(step, step)
    forwarder.forward()
    time.sleep(0.003)
"""

_CLOSE = """
import sys
from pathlib import Path
from tests.support.trackio_server import Run, configuration
folder, *server = sys.argv[1:]
forwarder = Run(Path(folder), configuration(**({"server": server[0]} if server else {}))).forwarder()
forwarder.close()
assert forwarder.problem is None, forwarder.problem
"""


@pytest.mark.parametrize("place", ["local", "server"])
def test_every_record_is_stored_once_after_kills_at_any_moment(place, request, tmp_path):
    server = request.getfixturevalue("server") if place == "server" else None
    address = [server.url] if server else []
    folder = server.folder if server else tmp_path / "trackio"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "TRACKIO_DIR": str(folder)}
    run, chance = Run(tmp_path / "run", configuration()), random.Random(place)
    for _ in range(3):
        step = max((r.get("step", 0) for r in run.records()), default=0) + 1 if run.spool.exists() else 1
        command = [sys.executable, "-c", _WORK, str(run.folder), str(step), *address]
        worker = subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert worker.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.5, 1.2))
        worker.kill()
        worker.wait()
    before = len(stored_rows(folder, "tests"))
    subprocess.run([sys.executable, "-c", _CLOSE, str(run.folder), *address], env=env, cwd=REPOSITORY, check=True)
    rows = stored_rows(folder, "tests")
    assert 0 < before <= len(rows)
    assert_once_each(rows, run.records())
    assert len({r["run_id"] for r in rows}) == 1
