"""Failing, stopped and killed stages: one line, the right events, and nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.workflow.workspace import Workspace
from tests.support.runs import Place, stage_process_of, wait_for_training, write_place


def _forget(place: Place, *keys: str) -> None:
    for key in keys:
        Workspace(place.run_folder).undo(key)
    (place.run_folder / "events.jsonl").unlink()
    shutil.rmtree(place.folder / "trackio")


# A file where the stage wants to make a folder: nothing that a check before the run could see.
IN_THE_WAY = {
    "training": ("train", ["train"], "adapter.partial"),
    "merge": ("merge", ["merge"], "merged-nf4.partial"),
    "evaluation": ("evaluate", ["evaluate"], "measurements/reference"),
    "quantization": ("quantize/int8", ["quantize/int8", "quantize/int4"], "quantized"),
}


@pytest.mark.parametrize("stage", IN_THE_WAY)
def test_a_stage_that_fails_says_so_in_one_line_in_the_events_and_in_trackio(copied, stage):
    _, keys, name = IN_THE_WAY[stage]
    _forget(copied, *keys)
    path = copied.run_folder / name
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("in the way")
    done = copied.tunepress("run", "tiny.yaml", check=1)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tunepress: ") and "Traceback" not in done.stdout
    failed = [e for e in copied.events() if e["event"] == f"{stage}_failed"]
    assert failed and failed[0]["error"] in ("FileExistsError", "NotADirectoryError") and failed[0]["message"]
    alerts = [a for a in copied.alerts() if a["title"] == f"{stage}_failed"]
    assert alerts and alerts[0]["level"] == "error"
    if stage == "merge":  # with the cause gone, the same command finishes the run
        path.unlink()
        copied.tunepress("run", "tiny.yaml")
        assert "training_started" not in copied.names() and "merge_completed" in copied.names()


def test_a_failed_publish_is_told_and_the_release_stays_whole(copied, hub):
    _forget(copied, "render")
    copied.hub = hub
    hub.fault(r"POST .*/commit/", status=403, times=100)
    done = copied.tunepress("run", "tiny.yaml", "--set", "publish.repo=ada/tiny", check=2)
    assert "ada/tiny" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "publish_failed" in [a["title"] for a in copied.alerts()]
    assert (copied.release / "int4" / "model.safetensors").is_file()


def _start(place: Place) -> subprocess.Popen:
    return subprocess.Popen(
        place.command("run", "tiny.yaml", "--set", "train.max_steps=400"),
        cwd=place.folder,
        env=place.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ends(pid: int) -> bool:
    for _ in range(100):
        if (
            not Path(f"/proc/{pid}").exists()
            or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        ):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize(
    ("how", "error", "level", "code"),
    [("ctrl-c", "KeyboardInterrupt", "warn", 130), ("kill -9", "Killed", "error", 1)],
)
def test_a_run_that_is_stopped_reports_it_and_resumes_from_its_checkpoint(
    tmp_path, tiny_model, how, error, level, code
):
    place = write_place(tmp_path, tiny_model("llama"), train={"max_steps": 400, "checkpoint_every": 1})
    process = _start(place)
    wait_for_training(place, process)
    while not list((place.run_folder / "checkpoints").glob("*/checkpoint-*/on-disk")):
        time.sleep(0.05)
    child = stage_process_of(place)
    if how == "ctrl-c":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert len(err.strip().splitlines()) == 1
    assert _ends(child)
    assert place.names()[-1] == "training_failed"
    assert place.events()[-1]["error"] == error
    assert (place.events()[-1]["message"] == "stopped by the user") == (how == "ctrl-c")
    assert ("training_failed", level) in [(alert["title"], alert["level"]) for alert in place.alerts()]
    assert not (place.run_folder / "adapter").exists()


def test_a_stage_ends_when_the_process_that_started_it_is_killed(tmp_path, tiny_model):
    place = write_place(tmp_path, tiny_model("llama"), train={"max_steps": 400})
    process = _start(place)
    wait_for_training(place, process)
    child = stage_process_of(place)
    process.kill()
    process.communicate()
    assert _ends(child)
    assert place.names() == ["training_started", "training_failed"]
