"""Rows that the base model's chat template refuses are bad rows like any other."""

import json
import re
from itertools import chain
from pathlib import Path

import pytest

from pipeline.config.loader import load_config
from pipeline.data import load_examples
from pipeline.data.chat import ChatTemplate
from pipeline.errors import UserError
from pipeline.models.safe_loading import open_tokenizer
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run_one
from pipeline.workflow.stages import calibration_text
from tests.support.runs import write_place

ROWS = 40
TWICE, TOOL = 7, 11  # the rows with two questions in a row, and with a call of a tool


def row(number):
    answer = {"role": "assistant", "content": f"A{number}"}
    if number == TOOL:
        answer["tool_calls"] = [{"name": "f", "arguments": {}}]
    return {"messages": [{"role": "user", "content": f"Q{number}"}] * (1 + (number == TWICE)) + [answer]}


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A run on a model with Gemma's template, and data with two rows that this template refuses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row(number)) for number in range(1, ROWS + 1)))

    def make(**data):
        return load_config(
            str(
                write_place(
                    tmp_path,
                    tiny_model("gemma3_text"),
                    data={"source": "chats.jsonl", "held_out": 0.3, **data},
                    train={"method": "lora", "max_steps": 1},
                    evaluate={"max_tokens": 256, "prompts": []},
                ).config
            )
        )

    return make


def test_row_that_the_template_refuses_is_named_by_its_place(place):
    with pytest.raises(
        UserError, match=rf"chats\.jsonl, line {TWICE}: .*refuses the conversation .*'Q{TWICE}'.*alternate"
    ):
        run_one(place(), "train", start=run_stage_here)


def test_rows_that_the_template_refuses_are_skipped_and_counted(place, tmp_path):
    config = place(on_bad_row="skip")
    workspace = run_one(config, "train", start=run_stage_here)
    data = workspace.read_measurement("data")
    assert (data["rows"], data["skipped"]) == (ROWS, 2)
    assert sum(split["examples"] for split in data["splits"].values()) == ROWS - 2
    skipped = (workspace.data / "skipped.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in skipped] == [f"line {TWICE}", f"line {TOOL}"]
    assert "does not write calls of tools" in skipped[1]
    # The split and the fingerprint do not depend on the model, so that other stages find the same data.
    tokenizer = open_tokenizer(Path(config.model.source))
    whole, part = load_examples(config.data), load_examples(config.data, check=ChatTemplate(tokenizer).check)
    assert whole.fingerprint == part.fingerprint == data["fingerprint"]
    assert {e.canonical() for e in part.held_out} <= {e.canonical() for e in whole.held_out}
    assert len(whole.train + whole.held_out) == len(part.train + part.held_out) + 2


def test_rows_that_the_template_refuses_are_not_calibrated_on(place):
    """They would stop the run after its training."""
    config = place(on_bad_row="skip")
    assert config.quantize.calibrated
    workspace, model = run_one(config, "train", start=run_stage_here), Path(config.model.source)
    windows = calibration_text.windows(config, workspace, model, 4096)
    answers = re.findall(r"A(\d+)\b", open_tokenizer(model).decode([*chain(*windows)]))
    known = [re.findall(r"A(\d+)\b", str(example)) for example in load_examples(config.data).train]
    refused = {str(TWICE), str(TOOL)} & {*chain(*known)}
    assert refused and len({*answers}) > ROWS / 4 and {*answers} <= {*chain(*known)} - refused
