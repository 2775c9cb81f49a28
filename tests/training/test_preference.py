"""Training on preference pairs: DPO and KTO alone, and after supervised fine-tuning on the same adapter."""

import json
import random

import pytest

from pipeline.config.loader import load_config
from pipeline.config.training_catalog import TRAINERS
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run_one
from tests.support.runs import write_place

PAIRS = {"source": "pairs.jsonl", "held_out": 0.25}
STEPS = {"max_steps": 6, "batch_size": 4, "learning_rate": 0.02, "checkpoint_every": 3, "evaluate_every": 3}


def write_pairs(folder, count=40):
    """Write pairs whose better answer is in capital letters."""
    draw = random.Random(1)
    with open(folder / "pairs.jsonl", "w") as file:
        for number in range(count):
            word = "".join(draw.choice("abcdef") for _ in range(6))
            row = {"prompt": f"Say {word} {number}", "chosen": word.upper(), "rejected": word}
            file.write(json.dumps(row) + "\n")


def trained_alone(tmp_path, model, monkeypatch, **train):
    write_pairs(tmp_path)
    place = write_place(tmp_path, model, data=PAIRS, train={**STEPS, **train})
    monkeypatch.chdir(tmp_path)
    return run_one(load_config(str(place.config)), "train", start=run_stage_here).read_measurement("training")


@pytest.mark.parametrize("trainer", [name for name, row in TRAINERS.items() if row.sequences == 2])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_preference_training_learns_which_answer_is_better(tiny_model, tmp_path, monkeypatch, trainer, method):
    found = trained_alone(tmp_path, tiny_model("llama"), monkeypatch, trainer=trainer, method=method)
    assert found["held_out_preference_accuracy"] > 0.5 + 2 * found["held_out_preference_accuracy_stderr"]
    assert found["held_out_reward_margin"] > 2 * found["held_out_reward_margin_stderr"] > 0
    losses = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0] < 0.6932 and found["held_out_loss"] == losses[-1]
