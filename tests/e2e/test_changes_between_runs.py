"""Changes between runs: edited and damaged files, and trackers and repositories that come and go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.support.runs import Place, stage_process_of, wait_for_training, write_place


@pytest.fixture
def on_hub(copied, hub):
    """A finished run that is published, and may be changed."""
    copied.hub = hub
    copied.tunepress("publish", "runs/tiny", "--repo", "ada/tiny")
    return copied


def test_publishing_keeps_an_outdated_variant_on_the_hub(on_hub):
    config = on_hub.run_folder / "config.yaml"
    settings = config.read_text()
    config.write_text(settings.replace("group_size: 64", "group_size: 32"))
    assert config.read_text() != settings
    done = on_hub.tunepress("publish", "runs/tiny", "--repo", "ada/tiny", check=2)
    assert "int4" in done.stderr and "tunepress quantize" in done.stderr
    assert (on_hub.release / "int4").is_dir() and "int4/model.safetensors" in on_hub.hub.files("ada/tiny")


def test_variant_that_is_no_longer_asked_for_stays_until_its_removal_is_asked_for(on_hub):
    settings = ("--set", "quantize.variants=[int8]", "--set", "publish.repo=ada/tiny")
    kept = on_hub.tunepress("run", "tiny.yaml", *settings)
    assert "int4: in the last release, so kept" in kept.stdout and "removed" not in kept.stdout
    assert (on_hub.release / "int4").is_dir() and "int4" in on_hub.results()
    assert "int4/model.safetensors" in on_hub.hub.files("ada/tiny")
    done = on_hub.tunepress("run", "tiny.yaml", *settings, "--remove", "int4")
    assert "removed int4" in done.stdout
    assert not (on_hub.release / "int4").exists() and "int4" not in on_hub.results()
    assert not [name for name in on_hub.hub.files("ada/tiny") if name.startswith("int4/")]


@pytest.mark.slow
def test_changed_general_text_is_measured_again_for_every_model(copied):
    text = (copied.folder / "general.txt").read_text()
    (copied.folder / "general.txt").write_text(text[::-1])
    before = copied.ledger()
    copied.tunepress("evaluate", "tiny.yaml")
    assert copied.ledger()["evaluate"] != before["evaluate"]
    done = copied.tunepress(
        "publish", "tiny.yaml", "--repo", "ada/tiny", check=2
    )  # the variants are still of the old text
    assert len(done.stderr.strip().splitlines()) == 1


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, step",
    [
        (lambda last: None, 4),
        pytest.param(lambda last: (last / "on-disk").unlink(), 2, marks=pytest.mark.slow),
        (lambda last: _cut(last / "training_state.safetensors"), 2),
    ],
    ids=["killed after the last step", "killed before it was on the disk", "its optimizer's state cut"],
)
def test_training_resumes_from_the_last_whole_checkpoint_with_the_same_result(tmp_path, tiny_model, damage, step):
    place = write_place(tmp_path, tiny_model("llama"))
    place.tunepress("train", "tiny.yaml")
    (last,) = place.run_folder.glob("checkpoints/*/checkpoint-4")
    kinds = {path.suffix for path in place.run_folder.rglob("*") if path.is_file()}
    assert not kinds & {".pt", ".pth", ".bin", ".pkl"}
    weights = (place.run_folder / "adapter" / "adapter_model.safetensors").read_bytes()
    before = place.results()["training"]
    damage(last)
    (place.run_folder / "ledger.json").unlink()
    place.tunepress("train", "tiny.yaml")
    after = place.results()["training"]
    assert after["resumed_from_step"] == step
    lasting = ("step", "loss", "eval_loss", "num_tokens", "learning_rate")
    first, second = ([{k: row.get(k) for k in lasting} for row in about["history"]] for about in (before, after))
    assert second == first and after["steps"] == 4 and after["train_loss"] == before["train_loss"]
    assert (place.run_folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_a_module_of_the_same_name_beside_the_user_does_no_harm(tmp_path, tiny_model):
    place = write_place(tmp_path, tiny_model("llama"))
    (tmp_path / "pipeline.py").write_text("raise SystemExit('not this one')\n")
    code = "import sys; sys.argv = ['tunepress', 'train', 'tiny.yaml']; from pipeline.cli import main; main()"
    command = [sys.executable, "-P", "-c", code]  # as the installed command starts: without the folder one stands in
    done = subprocess.run(command, cwd=tmp_path, env=place.env, capture_output=True, text=True)
    assert "training_completed" in place.names(), done.stderr


def test_events_that_trackio_missed_arrive_with_the_next_run_and_none_twice(tmp_path, tiny_model):
    place = write_place(tmp_path, tiny_model("llama"))
    (tmp_path / "trackio").write_text("a file where Trackio wants its folder")
    done = place.tunepress("train", "tiny.yaml")
    assert "Trackio" in done.stdout and done.stderr == ""
    (tmp_path / "trackio").unlink()
    place.tunepress("train", "tiny.yaml")  # nothing is left to do but to send
    place.tunepress("merge", "tiny.yaml")
    assert sorted(a["title"] for a in place.alerts()) == sorted(e["event"] for e in place.events())


def test_events_sent_before_a_kill_are_not_sent_again(tmp_path, tiny_model):
    long = {"max_steps": 200, "evaluate_every": 200, "checkpoint_every": 50}
    place = write_place(tmp_path, tiny_model("llama"), train=long)
    process = subprocess.Popen(place.command("train", "tiny.yaml"), cwd=place.folder, env=place.env)
    wait_for_training(place, process)
    while "training_started" not in [a["title"] for a in place.alerts()]:
        assert process.poll() is None
    stage_process_of(place)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    place.tunepress("train", "tiny.yaml")
    assert sorted(a["title"] for a in place.alerts()) == sorted(e["event"] for e in place.events())


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder(copied, tmp_path):
    shutil.rmtree(copied.release / "int4")
    config = json.loads(json.dumps(str(copied.folder / "tiny.yaml")))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("rows.jsonl", "general.txt"):
        shutil.copy2(copied.folder / name, elsewhere)
    done = subprocess.run(
        copied.command("run", config, "--runs", str(copied.folder / "runs")),
        cwd=elsewhere, env=copied.env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (copied.release / "int4" / "model.safetensors").is_file()


def test_too_little_held_out_text_is_found_before_training(tmp_path, tiny_model):
    place = write_place(tmp_path, tiny_model("llama"))
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:8]))
    done = place.tunepress("run", "tiny.yaml", "--set", "data.held_out=0.05", check=2)
    assert "held_out" in done.stderr and not [e for e in place.events() if e["event"].startswith("merge")]
    assert not (place.run_folder / "adapter").exists()


def test_renamed_run_is_recognized(copied):
    copied.run_folder.rename(copied.folder / "runs" / "other")
    done = copied.tunepress("publish", "runs/other", "--repo", "ada/tiny", check=2)
    assert "'tiny'" in done.stderr and not copied.run_folder.exists()


def test_layers_that_the_model_lacks_are_named_in_one_line(tmp_path, tiny_model):
    place: Place = write_place(tmp_path, tiny_model("llama"))
    done = place.tunepress("train", "tiny.yaml", "--set", "train.lora.target_modules=[foo]", check=2)
    assert "foo" in done.stderr and len(done.stderr.strip().splitlines()) == 1
