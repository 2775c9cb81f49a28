"""A trainer that one file registers: plan, run, card, lineage and verify with it."""

from __future__ import annotations

import json

import pytest

from tests.extension import calm_trainer
from tests.extension.runs import with_extensions
from tests.support.runs import Place, write_place


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model) -> Place:
    """A folder with a configuration that names the trainer, which registers itself from one file."""
    made = write_place(
        tmp_path_factory.mktemp("trainer"),
        tiny_model("llama"),
        train={"trainer": "calm", "max_steps": 2, "batch_size": 2, "accumulate": 1, "max_length": 96},
        quantize={"variants": []},
    )
    return with_extensions(made, calm_trainer)


@pytest.fixture(scope="module")
def finished(place) -> Place:
    """The same after a run."""
    place.tunepress("run", "tiny.yaml")
    return place


def test_plan_asks_the_trainer_for_its_merge_bases(place):
    plans = [
        place.tunepress("plan", "tiny.yaml", "--json", "--set", f"train.trainer={name}").stdout
        for name in ("calm", "sft")
    ]
    assert "both bases are merged" not in plans[0] and "both bases are merged" in plans[1]


def test_run_trains_with_it_and_merges_into_its_only_base(finished):
    results = finished.results()
    assert results["training"]["held_out_calm"] == 0.25 and results["training"]["held_out_loss"] > 0
    assert results["merge"]["base"] == "bf16" and not results["merge"]["compared"]
    completed = next(e for e in finished.events() if e["event"] == "training_completed")
    assert completed["held_out_calm"] == 0.25


def test_card_and_lineage_are_written_and_verified(finished):
    lineage = json.loads((finished.release / "tunepress.json").read_text())
    assert lineage["configuration"]["train"]["trainer"] == "calm"
    assert "Loss on held-out examples" in (finished.release / "README.md").read_text()
    assert json.loads(finished.tunepress("verify", "runs/tiny", "--no-measure", "--json").stdout)


def test_data_of_another_form_is_refused(place):
    done = place.tunepress("train", "tiny.yaml", "--set", "name=other", "--set", "train.trainer=talk", check=2)
    assert "has the form prompt_completion, and train.trainer talk takes only messages" in done.stderr


def test_without_its_file_the_name_is_refused(place, tmp_path):
    other = place.copy(tmp_path / "copy")  # which registers nothing
    assert "is no trainer; allowed are sft" in other.tunepress("plan", "tiny.yaml", check=2).stderr
