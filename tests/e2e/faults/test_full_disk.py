"""A full disk at any stage: one line, nothing damaged, and the run completes after space is freed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import CheckpointWriter
from pipeline.system.files import no_room, write_json
from pipeline.tracking.events import Events, read_events
from pipeline.workflow.workspace import Workspace
from tests.e2e.faults.runs import SETTINGS, WHO, undisturbed, write
from tests.e2e.faults.sameness import differences
from tests.support.hub import LoopbackHub

PAGE = 4096


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

    def fill(self, but: int = 0) -> None:
        """Leave no room, or so many kB."""
        free = shutil.disk_usage(self.folder).free - but * 1024
        (self.folder / "filler").write_bytes(bytes(free))

    def make_room(self) -> None:
        (self.folder / "filler").unlink()

    def remove(self) -> None:
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk", 64)
    yield disk
    disk.remove()


def test_full_disk_leaves_the_old_file_and_names_it(disk):
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
    disk.make_room()
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


def test_other_write_errors_are_not_reported_as_full_disk(disk):
    assert no_room(FileNotFoundError(2, "No such file")) is None and no_room(ValueError("full")) is None


@pytest.mark.slow
def test_full_disk_in_any_stage_gives_one_line_and_the_run_can_be_completed(tmp_path, tiny_model):
    settings = {**SETTINGS, "quality": "fast"}  # calibration needs more room than the variant
    with undisturbed(tmp_path / "whole", tiny_model("qwen3"), **settings) as (whole, _):
        pass
    variant = sum(-(-path.stat().st_size // PAGE) * PAGE for path in (whole.release / "int4").iterdir())
    # kB: room to begin with, but not for what is made. Of a variant first not for its files, then not for its figures.
    rooms = {"train": 32, "merge": 32, "evaluate": 32, "quantize": 32, "measure_variant": variant // 1024 + 14}
    disk = Disk(tmp_path / "place" / "work" / "runs", 64 * 1024)
    try:
        with LoopbackHub(tmp_path / "place/hub", WHO) as hub:
            place = write(tmp_path / "place", tiny_model("qwen3"), hub, **settings)
            for stage, room in {**rooms, "publish": 16}.items():
                verb = "quantize" if stage == "measure_variant" else stage
                if stage == "quantize":
                    shutil.rmtree(place.run_folder / "quantized")  # which the merge has made in its own pass
                    Workspace(place.run_folder).note("quantize/int4", written=None)
                ledger = place.run_folder / "ledger.json"  # which is written anew whenever something is recorded
                disk.fill(but=room + (ledger.stat().st_size // 1024 if ledger.exists() else 0))
                done = place.tunepress(verb, place.config.name, check=2)
                (line,) = done.stderr.strip().splitlines()
                told = rf"^tunepress: ({verb}|int4|document|runs/tiny/ledger\.json)\b.*(the disk is full|No space left)"
                assert re.search(told, line), line
                if verb == "quantize":
                    written = Workspace(place.run_folder).progress("quantize/int4", "written")
                    assert bool(written) == (stage == "measure_variant")
                disk.make_room()
                if stage != "quantize":
                    place.tunepress(verb, place.config.name)
            found = differences(place, whole)
            assert not [line for line in found if not re.search(r"_failed: |Trackio|^logs/", line)]
    finally:
        disk.remove()
