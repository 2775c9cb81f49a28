"""Training in two processes: the same loss curve, one report, and clean ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.support.runs import Place, write_place

TWO = ("--accelerate", "cpu-two")


def _place(folder: Path, model: Path, packing: bool, **train) -> Place:
    """Examples with very different numbers of counted tokens, which neither two processes nor batches divide."""
    settings = {
        "packing": packing, "max_steps": None, "epochs": 2, "batch_size": 3, "accumulate": 2, "evaluate_every": 4,
        "checkpoint_every": 3, "max_length": 64, "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}, **train,
    }  # fmt: skip
    place = write_place(folder, model, train=settings, quantize={"variants": ["int8"]})
    draw = random.Random(0)
    rows = [{"prompt": f"What is {n}?", "completion": "so " * draw.randrange(1, 16) + str(n)} for n in range(41)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def _training(place: Place, runs: str = "runs") -> dict:
    return json.loads((place.folder / runs / "tiny" / "results.json").read_text())["training"]


def _curve(training: dict, key: str) -> list[float]:
    return [row[key] for row in training["history"] if key in row]


def _agrees(two: dict, one: dict) -> bool:
    """Is it the same training, by every loss there is?"""
    assert len(_curve(one, "loss")) == one["steps"] and _curve(one, "eval_loss")
    assert one["processes"] == 1 and two["processes"] == 2
    for key in ("loss", "eval_loss"):
        assert _curve(two, key) == pytest.approx(_curve(one, key), rel=0.01)
    return _curve(one, "loss")[-1] < _curve(one, "loss")[0] / 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Place:
    """The same configuration trained by one process in `one/`, and run by two to its end in `runs/`."""
    place = _place(tmp_path_factory.mktemp("accelerate"), tiny_model("llama"), packing=True, method="qlora")
    place.tunepress("train", "tiny.yaml", "--runs", "one")
    place.tunepress("run", "tiny.yaml", *TWO)
    return place


def test_two_processes_give_the_loss_curve_of_one(trained):
    assert _agrees(_training(trained), _training(trained, "one"))


def test_two_processes_report_and_release_once(trained):
    names = trained.names()
    assert len(names) == len(set(names)) and names[:2] == ["training_started", "training_completed"]
    spool = (trained.run_folder / "events.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, spool) if "train/loss" in r.get("metrics", {})]
    assert steps == list(range(1, _training(trained)["steps"] + 1))
    assert (trained.release / "model.safetensors").is_file() and (trained.release / "int8").is_dir()
    assert (trained.run_folder / "logs" / "train.1.log").is_file()


def test_finished_run_does_not_depend_on_the_number_of_processes(trained):
    before = trained.ledger()["train"]
    trained.tunepress("train", "tiny.yaml")
    assert trained.ledger()["train"] == before


@pytest.mark.slow
@pytest.mark.usefixtures("cold")
def test_killed_and_stopped_distributed_training_ends_the_same(tmp_path, tiny_model):
    place = _place(tmp_path, tiny_model("llama"), packing=False, method="lora", epochs=8, learning_rate=0.002)
    place.tunepress("train", "tiny.yaml", "--runs", "one")
    run, pids = _start(place, *TWO)
    os.kill(pids[1], signal.SIGKILL)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1 and len(err.strip().splitlines()) == 1, err
    assert "train: process 1 of 2 killed by the system (SIGKILL)" in err and "train.1.log" in err
    _all_end(pids)
    run, pids = _start(place, *TWO)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 130 and len(err.strip().splitlines()) == 1, err
    _all_end(pids)
    failed = [event["error"] for event in place.events() if event["event"] == "training_failed"]
    assert failed == ["Killed", "KeyboardInterrupt"]
    assert not (place.run_folder / "adapter").exists()
    place.tunepress("train", "tiny.yaml", *TWO)
    training = _training(place)
    assert training["resumed_from_step"] and _agrees(training, _training(place, "one"))


@pytest.mark.slow
def test_two_machines_train_together_and_the_first_keeps_the_result(tmp_path, tiny_model):
    place = _place(tmp_path, tiny_model("llama"), packing=True, method="lora", epochs=1)
    nodes = place.folder / "nodes.yaml"
    nodes.write_text(
        "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n"
        f"main_process_ip: 127.0.0.1\nmain_process_port: {_free_port()}\n"
    )
    command = place.command("train", "tiny.yaml", "--accelerate", "nodes.yaml", "--machine-rank")
    started = [
        subprocess.Popen(
            [*command, rank], cwd=place.folder, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    for run in started:
        out, err = run.communicate(timeout=240)
        assert run.returncode == 0, err
    assert place.names() == ["training_started", "training_completed"]
    assert _training(place)["processes"] == 2 and (place.run_folder / "adapter").is_dir()
    other = place.folder / "runs" / ".tiny.machine-1"
    assert not (other / "adapter").exists() and not (other / "events.jsonl").exists()


def test_worker_machine_names_its_main_machine_and_can_be_stopped(tmp_path, tiny_model):
    place = _place(tmp_path, tiny_model("llama"), packing=True)
    with socket.create_server(("127.0.0.1", 0)) as machine_0:  # which never says anything
        nodes = place.folder / "nodes.yaml"
        nodes.write_text(
            "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n"
            f"main_process_ip: 127.0.0.1\nmain_process_port: {machine_0.getsockname()[1]}\n"
        )
        words = ("train", "tiny.yaml", "--accelerate", "nodes.yaml", "--machine-rank", "1")
        server = ("--set", "track.server=http://127.0.0.1:9")  # which would want a token
        run = subprocess.Popen(
            [sys.executable, "-c", PATIENT, *words, *server],
            cwd=place.folder, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        machine_0.settimeout(200)
        connection, _ = machine_0.accept()
        with connection:
            run.send_signal(signal.SIGINT)
            out, _ = run.communicate(timeout=100)
    assert run.returncode == 130, out
    assert "waiting for machine 0 at 127.0.0.1; stop this if its training is finished" in out


# The command, with stages that are given all the time in the world to end unless somebody says otherwise.
PATIENT = """
from functools import partial
from pipeline.workflow import stage_process
stage_process.run_stage = partial(stage_process.run_stage, grace=10**6)
from pipeline.cli import main
main()
"""


@pytest.mark.slow
def test_error_in_one_process_gives_one_line(tmp_path, tiny_model):
    place = _place(tmp_path, tiny_model("llama"), packing=True)
    done = place.tunepress("train", "tiny.yaml", *TWO, "--set", "train.max_length=2", check=2)
    assert done.stderr.startswith("tunepress: train: train.max_length 2: leaves no answer in any example")
    assert len(done.stderr.strip().splitlines()) == 1
    assert [e["error"] for e in place.events() if e["event"] == "training_failed"] == ["UserError"]


def test_indivisible_batch_is_refused_before_any_work(tmp_path):
    place = _place(tmp_path, tmp_path / "no-model", packing=True)
    done = place.tunepress("run", "tiny.yaml", *TWO, "--set", "train.accumulate=1", check=2)
    assert "train.batch_size 3 x train.accumulate 1: 3 examples a step cannot be shared by 2 processes" in done.stderr
    done = place.tunepress("run", "tiny.yaml", "--machine-rank", "1", check=2)
    assert done.stderr == "tunepress: --machine-rank, --main-process-ip: need --accelerate\n"
    assert not place.run_folder.exists()


@pytest.mark.slow
def test_a_4_bit_model_divided_by_fsdp_gives_its_adapter_back_whole(tmp_path, tiny_model):
    """FSDP2 by hand, since accelerate divides models on GPUs only."""
    script = tmp_path / "divided.py"
    script.write_text(DIVIDED)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, script, tiny_model("llama")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["whole"] * 2


DIVIDED = """
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.training.nf4_base import load_base
from pipeline.training.distributed import gather_adapter

def make(divided):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_base(Path(sys.argv[1]), True, divided), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model

mesh = init_device_mesh("cpu", (2,))
plain, divided = make(False), make(True)
ids = torch.arange(40).view(2, 20)
expected = plain(input_ids=ids, labels=ids).loss
for layer in divided.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(divided, mesh=mesh)
loss = divided(input_ids=ids, labels=ids).loss
loss.backward()
assert abs(loss - expected) < 1e-3, (loss, expected)
weights = gather_adapter(divided)
trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
assert weights.keys() == trained.keys() and all(torch.equal(weights[name], p) for name, p in trained.items())
held = [p.to_local().numel() / p.numel() for p in divided.parameters() if p.numel() > 1000]
assert len(held) > 10 and max(held) < 0.6
sys.stdout.write("whole\\n")
torch.distributed.barrier()
"""


def _start(place: Place, *arguments: str) -> tuple[subprocess.Popen, list[int]]:
    """A training that has got past a checkpoint of its own, and its processes by rank."""
    shutil.rmtree(place.run_folder / "checkpoints", ignore_errors=True)
    run = subprocess.Popen(
        place.command("train", "tiny.yaml", *arguments),
        cwd=place.folder, env=place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(1200):
        if list((place.run_folder / "checkpoints").glob("*/checkpoint-*/on-disk")):
            return run, _ranks_under(run.pid)
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    raise AssertionError("no checkpoint came")


def _ranks_under(pid: int) -> list[int]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if above == pid and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(folder.name)
    assert sorted(found) == [0, 1]
    return [found[0], found[1]]


def _all_end(pids: list[int]) -> None:
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {[pid for pid in pids if Path(f'/proc/{pid}').exists()]}")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
