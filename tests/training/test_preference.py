"""Training on preference pairs: DPO and KTO alone, and after supervised fine-tuning on the same adapter."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.config.training_catalog import TRAINERS
from pipeline.errors import ConfigError
from pipeline.training.accelerate_launch import Launch
from pipeline.training.trainers.kto import KtoTrainer
from pipeline.training.trainers.preference import preference_figures
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.preflight import check_shared
from pipeline.workflow.run import run_one
from tests.support.runs import stage_process_of, wait_for_training, write_place

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
    pairs = found["preference"]
    assert pairs["accuracy"]["value"] > 0.5 + 2 * pairs["accuracy"]["stderr"]
    assert pairs["margin"]["value"] > 2 * pairs["margin"]["stderr"] > 0
    assert found["held_out_preference_accuracy"] == pairs["accuracy"]["value"]
    losses = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0] < 0.6932 and found["held_out_loss"] == losses[-1]


def test_figures_are_those_of_the_best_checkpoint(tiny_model, tmp_path, monkeypatch):
    stopped = {"max_steps": 20, "early_stopping": 2, "evaluate_every": 1, "checkpoint_every": 1, "learning_rate": 0.8}
    found = trained_alone(tmp_path, tiny_model("llama"), monkeypatch, trainer="dpo", **stopped)
    measured = {row["step"]: row for row in found["history"] if "eval_loss" in row}
    best = measured[found["best_step"]]
    assert best["eval_loss"] < measured[found["steps"]]["eval_loss"]
    assert found["preference"]["margin"]["value"] == best["eval_reward_margin"]
    assert found["preference"]["held_out_loss"] == found["held_out_loss"] == best["eval_loss"]


@pytest.mark.parametrize("train", [{"trainer": "dpo"}, {"preference": {"data": PAIRS}}], ids=str)
def test_several_processes_are_refused_before_the_first_training(train):
    config = {"name": "tiny", "model": {"source": "ada/base"}, "data": {"source": "rows.jsonl"}, "train": train}
    launch = Launch(Path("ddp.yaml"), processes=2)
    with pytest.raises(ConfigError, match="the trainer dpo works in one process only. Try: without it"):
        check_shared(Config.model_validate(config), launch)


SECOND = {"data": PAIRS, "max_steps": 6, "batch_size": 4, "accumulate": 1, "learning_rate": 0.02}


def after_sft(tmp_path, model, monkeypatch, **preference):
    tmp_path.mkdir(exist_ok=True)
    write_pairs(tmp_path)
    steps = {"max_steps": 4, "checkpoint_every": 2}
    place = write_place(tmp_path, model, train={**steps, "preference": {**SECOND, **preference}})
    monkeypatch.chdir(tmp_path)
    return run_one(load_config(str(place.config)), "train", start=run_stage_here)


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("method", "options"),
    [("qlora", {}), ("lora", {}), ("lora", {"init_lora_weights": "pissa"}), ("lora", {"modules_to_save": ["norm"]})],
    ids=str,
)
def test_second_training_goes_on_with_the_adapter_of_the_first(tiny_model, tmp_path, monkeypatch, method, options):
    model = tiny_model("llama")
    write_pairs(tmp_path)
    train = {"method": method, "max_steps": 4, "checkpoint_every": 2, "preference": {**SECOND, "learning_rate": 1e-9}}
    train["lora"] = {"options": options}
    place = write_place(tmp_path, model, train=train)
    monkeypatch.chdir(tmp_path)
    workspace = run_one(load_config(str(place.config)), "train", start=run_stage_here)
    first = adapter_of(workspace.folder / "adapter-before-preference")
    for name, value in adapter_of(workspace.adapter).items():
        torch.testing.assert_close(value, first[name], atol=1e-6, rtol=0)  # it began there, unrounded
    found = workspace.read_measurement("training")["preference"]
    assert found["accuracy"]["value"] <= 0.6 and abs(found["margin"]["value"]) < 0.1  # the first is the reference


def test_second_training_is_measured_and_described(tiny_model, tmp_path, monkeypatch):
    workspace = after_sft(tmp_path, tiny_model("llama"), monkeypatch)
    training = workspace.read_measurement("training")
    found = training["preference"]
    assert found["accuracy"]["value"] > 0.5 + 2 * found["accuracy"]["stderr"]
    assert (training["steps"], found["steps"], found["trainer"]) == (4, 6, "dpo")
    assert workspace.read_measurement("data")["preference"]["held_out_pairs"] == 10
    spooled = [json.loads(line) for line in (workspace.folder / "events.jsonl").read_text().splitlines()]
    curve = [(r["step"], r["metrics"]) for r in spooled if "metrics" in r]
    assert [step for step, _ in curve] == sorted(step for step, _ in curve)
    assert any("preference/train/rewards/margins" in metrics for _, metrics in curve)


def test_other_settings_of_the_second_training_leave_the_first_alone(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    workspace = after_sft(tmp_path, model, monkeypatch)
    path = workspace.folder / "adapter-before-preference" / "adapter_model.safetensors"
    before, adapter = path.stat().st_mtime_ns, adapter_of(workspace.adapter)
    workspace = after_sft(tmp_path, model, monkeypatch, options={"beta": 0.5})
    assert path.stat().st_mtime_ns == before
    assert any(not torch.equal(value, adapter[name]) for name, value in adapter_of(workspace.adapter).items())


def test_pairs_whose_question_is_measured_are_left_out(tiny_model, tmp_path, monkeypatch):
    write_place(tmp_path, tiny_model("llama"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    with open(tmp_path / "same.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps({"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"}) + "\n")
    workspace = after_sft(tmp_path, tiny_model("llama"), monkeypatch, data={"source": "same.jsonl", "seed": 5})
    left = workspace.read_measurement("data")["preference"]
    assert left["training_pairs"] + left["held_out_pairs"] < len(rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"source": "rows.jsonl"}}, "train.trainer dpo takes only preference"),
        ({"data": {"source": "builtin:python-docs"}}, "train.trainer dpo takes only preference"),
        ({"trainer": "sft"}, "does not train on preference pairs; allowed are dpo, kto"),
        ({"options": {"betta": 1}}, "DPOConfig has no option 'betta'; did you mean 'beta'"),
        ({"options": {"learning_rate": 1}}, "set by train.learning_rate"),
        ({"data": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"data": {**PAIRS, "system": "Be brief."}}, "system: both trainings use the chat template of the first"),
    ],
    ids=str,
)
def test_wrong_second_training_is_refused_in_one_line(tiny_model, tmp_path, changes, said):
    place = write_place(tmp_path, tiny_model("llama"), train={"preference": {**SECOND, **changes}})
    write_pairs(tmp_path)
    done = place.tunepress("train", str(place.config), check=2)
    assert said in done.stderr and "Traceback" not in done.stderr


def test_sft_refuses_pairs_and_names_the_way_out(tiny_model, tmp_path):
    place = write_place(tmp_path, tiny_model("llama"), data=PAIRS)
    write_pairs(tmp_path)
    assert "train.trainer=dpo" in place.tunepress("train", str(place.config), check=2).stderr


def test_kto_estimates_the_distance_on_answers_to_other_prompts():
    pairs = Dataset.from_dict({"completion_ids": [[number] for number in range(6)]})  # two answers to each prompt
    found = KtoTrainer._prepare_dataset(None, pairs, None, SimpleNamespace(per_device_train_batch_size=4), "train")
    assert [ids for (ids,) in found["KL_completion_ids"]] == [2, 3, 0, 1, 5, 4]


def test_figures_of_pairs_have_their_errors():
    found = preference_figures([1.0, 2.0, -1.0, 2.0], [True, True, False, True], [False, True, False, False])
    assert found["preference_accuracy"] == 0.75 and found["preference_accuracy_stderr"] == pytest.approx(0.25)
    assert found["likelier_gain"] == 0.5 and found["likelier_gain_stderr"] == pytest.approx(0.2887, abs=1e-4)
    assert found["reward_margin"] == 1.0 and "loss" in found


def in_first_training(place):
    return (place.run_folder / "events.jsonl").read_text().count('"train/loss"') >= 3


def at_the_border(place):
    return (place.run_folder / "adapter-before-preference").is_dir()


def in_second_training(place):
    return (place.run_folder / "events.jsonl").read_text().count("preference/train/loss") >= 4


@pytest.mark.slow
def test_killed_trainings_continue_to_the_same_bytes(tiny_model, tmp_path):
    train = {"max_steps": 8, "checkpoint_every": 2, "preference": {**SECOND, "max_steps": 8, "accumulate": 2}}
    found = {}
    for moment in (None, in_first_training, at_the_border, in_second_training):
        folder = tmp_path / (moment.__name__ if moment else "undisturbed")
        folder.mkdir()
        write_pairs(folder)
        place = write_place(folder, tiny_model("llama"), train=train)
        if moment:
            command = place.command("train", str(place.config))
            process = subprocess.Popen(
                command, cwd=folder, env=place.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            wait_for_training(place, process)
            while not moment(place):
                assert process.poll() is None, "the run ended before it was killed"
                time.sleep(0.02)
            os.kill(stage_process_of(place), signal.SIGKILL)
            process.wait(60)
            assert not (place.run_folder / "adapter").is_dir()
        place.tunepress("train", str(place.config))
        adapters = (place.run_folder / name for name in ("adapter-before-preference", "adapter"))
        found[folder.name] = [(path / "adapter_model.safetensors").read_bytes() for path in adapters]
    assert all(bytes_of == found["undisturbed"] for bytes_of in found.values()), list(found)


def test_plan_counts_the_second_training(tiny_model, tmp_path):
    second = {key: value for key, value in SECOND.items() if key != "max_steps"}
    place = write_place(tmp_path, tiny_model("llama"), train={"preference": second})
    write_pairs(tmp_path)
    plan = json.loads(place.tunepress("plan", str(place.config), "--json").stdout)
    assert plan["data"]["preference_steps"] == 8  # 30 pairs, 4 in a step
    assert "Pairs" in place.tunepress("plan", str(place.config)).stdout
