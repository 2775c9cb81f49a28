"""Configurations of accelerate: understood or refused, and the sharing of a step."""

from __future__ import annotations

import pytest

from pipeline.config.schema import Config
from pipeline.errors import ConfigError, MissingExtra
from pipeline.training.accelerate_launch import Launch, read_launch, shipped_launches, split_step


@pytest.mark.parametrize(
    ("name", "machine_rank", "said"),
    [
        ("ddq", None, "--accelerate ddq: no such file. Try: a path, or one of cpu-two, ddp, deepspeed-zero3,"),
        ("cpu-two", 1, "--machine-rank 1: --accelerate cpu-two has 1 machine,"),
    ],
)
def test_invalid_address_or_rank_is_refused(name, machine_rank, said):
    with pytest.raises(ConfigError) as refusal:
        read_launch(name, machine_rank)
    assert str(refusal.value).startswith(said)


def test_gpus_that_are_not_there_are_missed_at_once(tmp_path):
    import torch

    file = tmp_path / "gpus.yaml"
    file.write_text(f"distributed_type: MULTI_GPU\nnum_processes: {torch.cuda.device_count() + 2}\n")
    with pytest.raises(ConfigError, match="needs . GPUs on this machine, which has"):
        read_launch(str(file))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "MULTI_GPU with use_cpu: true"),
        ("distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 1\n", "several are needed"),
        ("distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 3\nnum_machines: 2\n", "as many on each"),
        ("distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 2\n", "--main-process-ip"),
        ("distributed_type: FSDP\nnum_processes: 2\n", "fsdp_version must be 2"),
        ("distributed_type: MULTI_GPU\nprocesses: 2\n", "accelerate cannot read it"),
        ("num_processes: 2\n", "accelerate cannot read it"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: two}\n", "fsdp_version must be 2"),
        ("distributed_type: FSDP\nfsdp_config: two\n", "fsdp_config 'two': must hold settings"),
        ("distributed_type: MULTI_GPU\nnum_machines: 0\n", "num_machines 0: must be a whole number, 1 or more"),
        ("distributed_type: MULTI_GPU\nnum_processes: two\n", "num_processes 'two': must be a whole number"),
        ("distributed_type: MULTI_GPU\nnum_processes:\n", "num_processes None: must be a whole number"),
        ("distributed_type: MULTI_GPU\nmachine_rank: one\n", "machine_rank 'one': must be a whole number"),
        ("distributed_type: MULTI_GPU\nmain_process_port: http\n", "main_process_port 'http': must be"),
        ("distributed_type: MULTI_GPU\nuse_cpu: 'false'\n", "use_cpu 'false': must be true or false, without"),
        ("- 1\n", "not a configuration of accelerate, which has distributed_type"),
        ("ddp\n", "not a configuration of accelerate, which has distributed_type"),
        ("", "not a configuration of accelerate, which has distributed_type"),
    ],
)
def test_an_accelerate_file_that_does_not_fit_is_refused(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_launch(str(file))
    assert said in str(refusal.value) and str(file) in str(refusal.value)


def test_missing_deepspeed_names_the_extra():
    with pytest.raises(MissingExtra, match=r"tunepress\[deepspeed\]"):
        read_launch("deepspeed-zero3")


@pytest.mark.parametrize("name", shipped_launches())
def test_accelerate_understands_the_shipped_files(name):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    launch = Launch(shipped_launches()[name], processes=4, main_process_ip="10.0.0.1")
    command = launch.command("pipeline.workflow.stages", "runs/x", "train")
    assert command[2:4] == ["-m", "accelerate.commands.launch"]
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[4:]))
    assert asked.num_processes == 4 and asked.module and asked.training_script == "pipeline.workflow.stages"
    assert asked.training_script_args == ["runs/x", "train"]
    kinds = {"fsdp-qlora": "use_fsdp", "deepspeed-zero3": "use_deepspeed"}
    assert [k for k in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(asked, k)] == [
        kinds.get(name, "multi_gpu")
    ]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "shared"),
    [(4, 4, 2, (4, 2)), (4, 1, 2, (2, 1)), (4, 6, 4, (2, 3)), (2, 3, 6, (1, 1)), (8, 1, 8, (1, 1))],
)
def test_step_has_as_many_examples_in_any_number_of_processes(batch_size, accumulate, processes, shared):
    assert split_step(_config(batch_size, accumulate), processes) == shared
    assert shared[0] * shared[1] * processes == batch_size * accumulate


def _config(batch_size: int, accumulate: int) -> Config:
    train = {"batch_size": batch_size, "accumulate": accumulate}
    return Config.model_validate({"name": "x", "model": {"source": "x"}, "data": {"source": "x"}, "train": train})
