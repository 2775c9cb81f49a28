"""Training in several processes: what `accelerate launch` is asked for, and whether a configuration can be shared out.

The file is one of accelerate's own (https://huggingface.co/docs/accelerate, `accelerate config`), or the
name of one that comes along in `configs/accelerate/`. It says where training runs and not what is trained:
a step sees the same examples, so a finished training holds wherever it was done.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import ConfigError, MissingExtra
from pipeline.system.libraries import is_installed
from pipeline.system.resources import shipped_folder

KINDS = ("MULTI_GPU", "FSDP", "DEEPSPEED")
NO_CONFIGURATION = "not a configuration of accelerate, which has distributed_type: MULTI_GPU and the like"
PORT = 29500  # where machines meet if nobody says otherwise, as in accelerate


@dataclass(frozen=True)
class Launch:
    """Processes that train together: `processes` in all, evenly on `machines`, of which this is `machine_rank`."""

    file: Path
    processes: int
    machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int = 0  # 0: any that is free
    on_cpu: bool = False

    @property
    def ranks_here(self) -> range:
        """Ranks of the processes on this machine."""
        here = self.processes // self.machines
        return range(self.machine_rank * here, (self.machine_rank + 1) * here)

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that runs `python -m module arguments` in each process."""
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
        """What the processes find in their environment besides accelerate's own."""
        # The folder that the user stands in may have a `pipeline` of its own; accelerate passes no -P on.
        own = {"TUNEPRESS_PROCESSES": str(self.processes), "PYTHONSAFEPATH": "1"}
        return own | ({"CUDA_VISIBLE_DEVICES": ""} if self.on_cpu else {})


def shipped_launches() -> dict[str, Path]:
    """accelerate's configurations that come along, by name."""
    return {p.stem: p for p in sorted((shipped_folder("configs") / "accelerate").glob("*.yaml"))}


def read_launch(named: str, machine_rank: int | None = None, main_process_ip: str | None = None) -> Launch:
    """What an accelerate configuration asks for; imports torch.

    Args:
        named: path of a file that accelerate reads, or the name of one that comes along.
        machine_rank: which of several machines this is, if the file does not say.
        main_process_ip: address of machine 0, likewise.

    Raises:
        ConfigError: where there is no such file, or it asks for what cannot be done here.
        MissingExtra: where it needs a package that is not installed.
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
        raise ConfigError(f"{about}: several machines need the address of machine 0; use --main-process-ip")
    port = asked.main_process_port or (PORT if machines > 1 else 0)
    return Launch(path, processes, machines, rank, address, port, asked.use_cpu)


def share(config: Config, processes: int) -> tuple[int, int]:
    """Batch size and accumulation of each of so many processes, for the same examples in a step as in one.

    Raises:
        ConfigError: where a step's examples cannot be divided evenly.
    """
    train = config.train
    step = train.batch_size * train.accumulate
    if step % processes:
        raise ConfigError(
            f"train.batch_size {train.batch_size} x train.accumulate {train.accumulate}: {step} examples a step "
            f"cannot be shared by {processes} processes; make one of them a multiple of {processes}"
        )
    common = math.gcd(train.accumulate, processes)  # accumulation is time that is saved; smaller batches cost some
    return train.batch_size // (processes // common), train.accumulate // common


def _read(named: str):
    """accelerate's own reading of the file, and where it lies."""
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    shipped = shipped_launches()
    path = shipped.get(named, Path(named)) if not os.path.isfile(named) else Path(named)
    if not os.path.isfile(path):
        raise ConfigError(f"--accelerate {named}: no such file; shipped are {', '.join(shipped)}")
    try:
        asked = load_config_from_file(str(path))
    except (TypeError, AttributeError):  # a key is missing, or there are none at all
        raise ConfigError(f"--accelerate {named}: {NO_CONFIGURATION}") from None
    except (ValueError, OSError, RecursionError, LookupError, yaml.YAMLError) as error:
        raise ConfigError(f"--accelerate {named}: accelerate cannot read it: {error}") from None
    if not isinstance(asked, ClusterConfig):
        raise ConfigError(f"--accelerate {named}: only compute_environment LOCAL_MACHINE is supported")
    return asked, path.resolve()


def _check_values(asked, about: str) -> None:
    """Are the values that are used here what they should be? accelerate takes any, and fails on them later."""
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


def _count(asked, about: str) -> int:
    """Processes on all machines: as many as the file says, else one for each GPU."""
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
