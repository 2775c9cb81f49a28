"""A run whose stages are all done in the process that asks for it."""

from __future__ import annotations

import pytest

from pipeline.config.loader import load_config
from pipeline.errors import Interrupted, StageFailed
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run, run_one
from tests.support.runs import write_place


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    small = {"max_tokens": 512, "prompts": []}
    place = write_place(tmp_path, tiny_model("qwen3"), train={"method": "lora"}, evaluate=small)
    monkeypatch.chdir(tmp_path)
    return place


def test_run_in_one_process_makes_and_records_what_a_run_does(place, unpublished):
    workspace = run(load_config(str(place.config)), start=run_stage_here)
    assert workspace.ledger().keys() == unpublished.ledger().keys()
    told = place.names()
    assert [name for name in unpublished.names() if name not in told] == []
    assert (workspace.release / "int4" / "model.safetensors").is_file()
    kept = workspace.ledger().keys() - {"calibrate"}  # which no variant needs any more
    assert place.tunepress("run", "tiny.yaml").stdout.count("done before") == len(kept)


def test_stage_that_fails_in_the_process_is_told_as_one_in_a_process_of_its_own(place):
    setting = "train.lora.target_modules=[foo]"  # which only the model can tell to be wrong
    config = load_config(str(place.config), [setting])
    with pytest.raises(StageFailed) as here:
        run_one(config, "train", start=run_stage_here)
    elsewhere = place.tunepress("train", "tiny.yaml", "--set", setting, check=2)
    assert elsewhere.stderr.strip() == f"tunepress: {here.value}" and here.value.exit_code == 2
    first, second = (event for event in place.events() if event["event"] == "training_failed")
    assert (first["error"], first["message"]) == (second["error"], second["message"])


def test_stage_that_ctrl_c_ends_in_the_process_is_told_as_stopped(place, monkeypatch):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.workflow.in_process.perform", stop)
    with pytest.raises(Interrupted):
        run_one(load_config(str(place.config)), "train", start=run_stage_here)
    stopped = place.events()[-1]
    assert (stopped["event"], stopped["message"]) == ("training_failed", "stopped by the user")


def test_stage_that_is_killed_for_not_ending_after_ctrl_c_is_told_as_stopped(place, monkeypatch):
    monkeypatch.setattr("pipeline.workflow.stage_process._watch", lambda child, *arguments: child.kill() is None)
    with pytest.raises(Interrupted):
        run_one(load_config(str(place.config)), "train")
    assert [(e["error"], e["message"]) for e in place.events() if e["event"] == "training_failed"] == [
        ("KeyboardInterrupt", "stopped by the user")
    ]
