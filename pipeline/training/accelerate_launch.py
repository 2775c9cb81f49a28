"""Training in several processes: the settings of `accelerate launch`, and the share of each process in a step.

The settings come from a file of `accelerate config` (https://huggingface.co/docs/accelerate), or from a shipped file
in `configs/accelerate/`. They say on which processes training runs. A step sees the same examples on any of them.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.errors import ConfigError, MissingExtra
from pipeline.system.libraries import is_installed
from pipeline.system.resources import shipped_folder

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

KINDS = ("MULTI_GPU", "FSDP", "DEEPSPEED")
NO_CONFIGURATION = "not a configuration of accelerate, which has distributed_type: MULTI_GPU and the like"
PORT = 29500  # the default port of machine 0, as in accelerate


@dataclass(frozen=True)
class Launch:
    """The processes that train together.

    Attributes:
        file: the accelerate configuration.
        processes: number of processes on all machines, the same number on each.
        machines: number of machines.
        machine_rank: number of this machine, from 0.
        main_process_ip: address of machine 0.
        main_process_port: port of machine 0; 0 for any free port.
        on_cpu: True if GPUs are not used.
    """

    file: Path
    processes: int
    machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int = 0
    on_cpu: bool = False

    @property
    def ranks_here(self) -> range:
        """The ranks of the processes on this machine."""
        here = self.processes // self.machines
        return range(self.machine_rank * here, (self.machine_rank + 1) * here)

    def command(self, module: str, *arguments: str) -> list[str]:
        """Return the command line that runs `python -m module arguments` in each process."""
        options = {
            "--config_file": self.file,
            "--num_processes": self.processes,
            "--num_machines": self.machines,
            "--machine_rank": self.machine_rank,
            "--main_process_port": self.main_process_port,
        }
        if self.main_process_ip:
            options["--main_process_ip"] = self.main_process_ip
        words = [str(word) for option in options.items() for word in option]
        return [sys.executable, "-P", "-m", "accelerate.commands.launch", *words, "--module", module, *arguments]

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the processes, beside those of accelerate."""
        # The working folder may have a `pipeline` of its own, and accelerate does not pass -P on.
        own = {"TUNEPRESS_PROCESSES": str(self.processes), "PYTHONSAFEPATH": "1"}
        return own | ({"CUDA_VISIBLE_DEVICES": ""} if self.on_cpu else {})


def shipped_launches() -> dict[str, Path]:
    """Return the shipped accelerate configurations by name."""
    return {p.stem: p for p in sorted((shipped_folder("configs") / "accelerate").glob("*.yaml"))}


def read_launch(named: str, machine_rank: int | None = None, main_process_ip: str | None = None) -> Launch:
    """Read and check an accelerate configuration; imports torch.

    Args:
        named: path of a file that accelerate reads, or the name of a shipped one.
        machine_rank: number of this machine; None for the number in the file.
        main_process_ip: address of machine 0; None for the address in the file.

    Raises:
        ConfigError: if there is no such file, or if this machine cannot do what it says.
        MissingExtra: if it needs a package that is not installed.
    """
    asked, path = _read(named)
    about = f"--accelerate {named}"
    _check_values(asked, about)
    kind = str(getattr(asked.distributed_type, "value", asked.distributed_type))
    if kind not in KINDS:
        more = " (on the CPU: MULTI_GPU with use_cpu: true)" if kind == "MULTI_CPU" else ""
        raise ConfigError(f"{about}: distributed_type {kind} is not supported; allowed are {', '.join(KINDS)}{more}")
    if kind == "FSDP" and asked.fsdp_config.get("fsdp_version") != 2:
        raise ConfigError(f"{about}: fsdp_version must be 2, which can hold 4-bit weights and their adapter together")
    if kind == "DEEPSPEED" and not is_installed("deepspeed"):
        raise MissingExtra(f"{about}: DeepSpeed", "deepspeed")
    if asked.use_cpu and kind != "MULTI_GPU":
        raise ConfigError(f"{about}: use_cpu: {kind} needs GPUs")
    processes, machines = _count(asked, about), asked.num_machines
    rank = asked.machine_rank if machine_rank is None else machine_rank
    if not 0 <= rank < machines:
        raise ConfigError(f"--machine-rank {rank}: {about} has {machines} machine{'s' * (machines > 1)}, from 0 on")
    address = main_process_ip or asked.main_process_ip
    if machines > 1 and not address:
        raise ConfigError(f"{about}: several machines need the address of machine 0. Try: --main-process-ip")
    port = asked.main_process_port or (PORT if machines > 1 else 0)
    return Launch(path, processes, machines, rank, address, port, asked.use_cpu)


def split_step(config: Config, processes: int) -> tuple[int, int]:
    """Return batch size and accumulation of each process, so that a step sees the same examples as in one process.

    Raises:
        ConfigError: if the examples of a step cannot be divided evenly.
    """
    train = config.train
    step = train.batch_size * train.accumulate
    if step % processes:
        raise ConfigError(
            f"train.batch_size {train.batch_size} x train.accumulate {train.accumulate}: {step} examples a step "
            f"cannot be shared by {processes} processes. Try: make one of them a multiple of {processes}"
        )
    common = math.gcd(train.accumulate, processes)  # less accumulation saves time; smaller batches cost time
    return train.batch_size // (processes // common), train.accumulate // common


def _read(named: str) -> tuple[ClusterConfig, Path]:
    """Return an accelerate configuration and the path of its file."""
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    shipped = shipped_launches()
    path = shipped.get(named, Path(named)) if not os.path.isfile(named) else Path(named)
    if not os.path.isfile(path):
        raise ConfigError(f"--accelerate {named}: no such file. Try: a path, or one of {', '.join(shipped)}")
    try:
        asked = load_config_from_file(str(path))
    except (TypeError, AttributeError):  # a key is missing, or the file is no mapping
        raise ConfigError(f"--accelerate {named}: {NO_CONFIGURATION}") from None
    except (ValueError, OSError, RecursionError, LookupError, yaml.YAMLError) as error:
        raise ConfigError(f"--accelerate {named}: accelerate cannot read it: {error}") from None
    if not isinstance(asked, ClusterConfig):
        raise ConfigError(f"--accelerate {named}: only compute_environment LOCAL_MACHINE is supported")
    return asked, path.resolve()


def _check_values(asked: ClusterConfig, about: str) -> None:
    """Check the types of the values, because accelerate takes any and fails later.

    Raises:
        ConfigError: naming the key and the value.
    """
    for key, least in (("num_machines", 1), ("num_processes", -1), ("machine_rank", 0)):
        value = getattr(asked, key)
        if type(value) is not int or value < least:
            raise ConfigError(f"{about}: {key} {value!r}: must be a whole number, {least} or more")
    port = asked.main_process_port
    if port is not None and (type(port) is not int or not 0 <= port < 65536):
        raise ConfigError(f"{about}: main_process_port {port!r}: must be a whole number, 0 to 65535")
    if not isinstance(asked.use_cpu, bool):
        raise ConfigError(f"{about}: use_cpu {asked.use_cpu!r}: must be true or false, without quotes")
    if not isinstance(asked.fsdp_config, dict):
        raise ConfigError(f"{about}: fsdp_config {asked.fsdp_config!r}: must hold settings, such as fsdp_version: 2")


def _count(asked: ClusterConfig, about: str) -> int:
    """Return the number of processes on all machines: that of the file, else one for each GPU."""
    import torch

    machines, gpus = asked.num_machines, 0 if asked.use_cpu else torch.cuda.device_count()
    processes = gpus * machines if asked.num_processes == -1 else asked.num_processes
    here, odd = divmod(processes, machines)
    if not asked.use_cpu and (here > gpus or not gpus):
        wanted = f"{here} GPUs" if here else "GPUs"
        raise ConfigError(f"{about}: needs {wanted} on this machine, which has {gpus or 'none'}")
    if odd or processes < 2:
        raise ConfigError(f"{about}: num_processes {processes} on {machines} machine{'s' * (machines > 1)}: "
                          "several are needed, and as many on each")  # fmt: skip
    return processes
