"""The memory of a process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from tests.support import REPOSITORY

FREED = """
import sys
from pathlib import Path
from pipeline.system.hardware import give_back_buffers
if sys.argv[1] == "given back":
    give_back_buffers()
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
bytearray(31 << 20)  # when this is freed, glibc raises its limit
buffers, between = [], []
for _ in range(20):
    buffers.append(bytearray(8 << 20))
    between.append(bytearray(100_000))
before = held()
buffers.clear()
print(before - held())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_buffers_are_given_back_although_small_ones_lie_between_them():
    def freed(how):
        done = subprocess.run([sys.executable, "-c", FREED, how], cwd=REPOSITORY, capture_output=True, check=True)
        return int(done.stdout)

    assert freed("given back") > 150e6 > freed("kept")
