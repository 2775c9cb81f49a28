"""A tracker that one file registers: a run is checked by it, shown by it, and sends every event to it."""

from __future__ import annotations

import json

import pytest

from tests.extension import diary_tracker
from tests.extension.runs import with_extensions
from tests.support.runs import Place, write_place


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model) -> Place:
    """A run without variants, so that it is quick, with the tracker from one file."""
    folder = tmp_path_factory.mktemp("tracker")
    made = write_place(
        folder,
        tiny_model("llama"),
        train={"max_steps": 2, "batch_size": 2, "accumulate": 1, "max_length": 96, "method": "lora"},
        quantize={"variants": []},
        track={"tracker": "diary", "file": "diary.jsonl"},
    )
    with_extensions(made, diary_tracker)
    made.output = made.tunepress("run", "tiny.yaml")
    return made


def test_every_record_arrives_once_and_in_order(place):
    records = [json.loads(line) for line in (place.folder / "diary.jsonl").read_text().splitlines()]
    spool = [json.loads(line) for line in (place.run_folder / "events.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in record.items() if k != "id"} for record in records] == spool
    assert len({record["id"] for record in records}) == len(spool)
    assert "training_completed" in place.names()


def test_terminal_and_doctor_name_it(place):
    assert "Dashboard  cat diary.jsonl" in place.output.stdout
    assert "Diary" in place.tunepress("doctor", "--no-calibrate").stdout


def test_sync_sends_what_is_missing(place):
    diary = place.folder / "diary.jsonl"
    lines = diary.read_text().splitlines(keepends=True)
    diary.write_text("".join(lines[:1]))
    assert "records sent" in place.tunepress("sync", "runs/tiny").stdout
    assert diary.read_text() == "".join(lines)


def test_its_settings_are_checked_and_kept(place):
    assert "file: diary.jsonl" in (place.run_folder / "config.yaml").read_text()
    done = place.tunepress("run", "tiny.yaml", "--set", "track.file=diary.txt", check=2)
    assert "not a diary" in done.stderr
    assert "track.space" in place.tunepress("run", "tiny.yaml", "--set", "track.space=ada/board", check=2).stderr


def test_without_its_file_the_name_is_refused(place, tmp_path):
    other = place.copy(tmp_path / "copy")  # which registers nothing
    assert "is no tracker; allowed are trackio" in other.tunepress("run", "tiny.yaml", check=2).stderr
