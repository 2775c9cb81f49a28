"""A run killed with -9 and resumed: the same result as an undisturbed run.

Eight of the forty moments of `scripts/kill_and_resume.py`, all of one run, which costs less than a run each; and what
a power cut would leave of the undisturbed one.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.faults.power_cut import hasty
from tests.e2e.faults.runs import SETTINGS, disturbed
from tests.e2e.faults.sameness import differences


def test_a_run_killed_at_eight_moments_ends_as_if_undisturbed(tmp_path, tiny_model, whole):
    place, timeline = whole
    moments = timeline.moments(40)[2::5]
    killed, found = disturbed(tmp_path, tiny_model("qwen3"), place, timeline, moments, **SETTINGS)
    assert not found
    assert sum(killed) >= 7  # the last may come too late on a machine that others use, too


def test_run_records_only_synced_files(whole):
    place, _ = whole
    notes = place.folder / "disk.jsonl"
    named = {Path(json.loads(line)["to"]).name for line in notes.open() if "rename" in line}
    assert {"ledger.json", "adapter", "int4", "model.safetensors", "config.json", "README.md"} <= named
    assert not list(hasty(notes, place.run_folder))


def test_undisturbed_run_equals_itself(whole):
    place, _ = whole
    assert not list(differences(place, place))


def test_a_changed_byte_a_lost_event_and_a_card_that_lies_are_differences(whole, tmp_path):
    place, _ = whole
    other = place.copy(tmp_path / "copy")
    weights = other.release / "int4/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    events = other.run_folder / "events.jsonl"
    events.write_text("".join(line for line in events.open() if "merge_completed" not in line))
    card = other.release / "README.md"
    card.write_text(card.read_text().replace("## Training data", "## Training data of another"))
    found = "\n".join(differences(other, place))
    for told in ("release/int4/model.safetensors: other bytes", "events: missing merge_completed", "README.md"):
        assert told in found
