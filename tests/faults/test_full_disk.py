"""A disk that is full, wherever a run has got to: one line, nothing corrupt, and more room completes it."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch

from pipeline.checkpoint import CheckpointWriter
from pipeline.errors import CheckpointError
from pipeline.events import Events, read_events
from pipeline.files import no_room, write_json
from tests.faults.conftest import SETTINGS
from tests.faults.runs import WHO, write
from tests.faults.sameness import differences
from tests.hub import LoopbackHub

STEP = 512  # kB that a disk has at first, and gets each time that it is full


class Disk:
    """A small file system in memory, which only root may make."""

    def __init__(self, folder, kilobytes: int):
        self.folder = folder
        folder.mkdir(parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True
        )
        if done.returncode:
            pytest.skip("no file system can be mounted here")

    def grow(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", self.folder], check=True)

    def fill(self) -> None:
        with open(self.folder / "filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    def remove(self) -> None:
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk", 64)
    yield disk
    disk.remove()


def test_a_file_stays_as_it_was_and_the_error_names_it(disk):
    path = disk.folder / "figures.json"
    write_json(path, {"known": 1})
    disk.fill()
    with pytest.raises(OSError) as error:
        write_json(path, {"known": "x" * 10_000})
    assert path.read_text() == '{\n  "known": 1\n}\n' and not list(disk.folder.glob("*.partial"))
    assert re.fullmatch(
        rf"{path}: the disk is full, 0 bytes are left; make room, and run it again", str(no_room(error.value))
    )


def test_an_event_that_does_not_fit_is_an_error_and_harms_no_other(disk):
    events = Events(disk.folder / "events.jsonl", "tiny")
    events.emit("train", "started")
    disk.fill()
    with pytest.raises(OSError):
        for _ in range(100):
            events.emit("train", "completed", note="x" * 500)
    told = len(read_events(events.path)[0])
    (disk.folder / "filler").unlink()
    events.emit("merge", "started")
    records = read_events(events.path)[0]
    assert len(records) == told + 1 and records[-1]["event"] == "merge_started"


def test_a_checkpoint_that_does_not_fit_leaves_nothing(disk):
    writer = CheckpointWriter(disk.folder, {"a": (torch.float32, (50_000,))})
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written \(No space left on device\)"),
        writer,
    ):
        writer.write("a", torch.zeros(50_000))
    assert not os.listdir(disk.folder)


def test_what_is_no_full_disk_is_not_taken_for_one(disk):
    assert no_room(FileNotFoundError(2, "No such file")) is None and no_room(ValueError("full")) is None


def test_a_run_on_a_disk_that_is_full_again_and_again_completes_as_if_undisturbed(tmp_path, tiny_model, whole):
    disk = Disk(tmp_path / "place/work/runs", STEP)
    try:
        with LoopbackHub(tmp_path / "place/hub", WHO) as hub:
            place = write(tmp_path / "place", tiny_model("qwen3"), hub, **SETTINGS)
            size, told = STEP, []
            while (done := place.tunepress("run", place.config.name, check=None)).returncode:
                (line,) = done.stderr.strip().splitlines()
                assert done.returncode == 2 and re.search("disk is full|No space left", line), line
                told.append(line.split()[1].rstrip(":"))
                size += STEP
                disk.grow(size)
                assert size < 40 * STEP, told
            assert {"train", "merge"} <= set(told)
            found = differences(place, whole[0])
            assert not [line for line in found if not re.search(r"_failed: |Trackio", line)]
    finally:
        disk.remove()
