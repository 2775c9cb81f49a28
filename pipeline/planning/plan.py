"""The plan of a configuration: needs of its stages, shortages and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config, TrainingRun
from pipeline.models.context import check_length
from pipeline.planning import memory, timing
from pipeline.planning.advice import Change, advise
from pipeline.planning.benchmark import Speeds, read_speeds
from pipeline.planning.data import DataSize, data_size, steps
from pipeline.planning.devices import Machine, gpu_by_name, this_machine
from pipeline.planning.model import Sizes, adapter_sizes, read_sizes
from pipeline.planning.stages import Stage, disk_peaks, stages_of
from pipeline.planning.training_memory import adapter_parameters
from pipeline.quantization.experts import check_experts
from pipeline.quantization.fit import check_patterns
from pipeline.system.command_names import command
from pipeline.training.lora_targets import check_targets

UNTIMED = ("publish",)  # its time is the network's


@dataclass(frozen=True)
class Shortage:
    """A shortage of memory or disk in a stage; `need` and `have` in bytes."""

    stage: str
    what: str  # main memory, GPU memory, disk
    need: int
    have: int


@dataclass(frozen=True)
class Plan:
    """The needs of a run, in bytes and seconds; None if not known.

    Attributes:
        changes: settings with which the run fits; empty if it fits already, or if no known settings help.
        seconds: the known times by stage; empty if the machine was not measured.
        why_no_times: the reason that no times are known; None if the machine was measured.
    """

    config: Config
    machine: Machine
    model: Sizes
    data: DataSize | None
    adapter_parameters: int
    steps: int | None
    stages: Sequence[Stage]
    shortages: Sequence[Shortage]
    changes: Sequence[Change]
    seconds: dict[str, float]
    why_no_times: str | None
    second_steps: int | None = None  # of `train.preference`

    @property
    def fits(self) -> bool:
        """Return True if nothing is short."""
        return not self.shortages

    @property
    def untimed(self) -> dict[str, str]:
        """Return the stages without a time on a measured machine, each with its reason: `which ...`."""
        unknown = () if self.why_no_times else (s for s in self.stages if s.name not in self.seconds)
        return {s.name: s.untimed or "whose steps are not known" for s in unknown if s.name not in UNTIMED}

    @property
    def total_seconds(self) -> float | None:
        """Return the time of the whole run without the network; None if a stage's time is not known."""
        return None if self.why_no_times or self.untimed else sum(self.seconds.values())

    @property
    def disk_bytes(self) -> int:
        """Return the largest size of the run's folder at any time."""
        return max((peak for _, peak in disk_peaks(self.stages)), default=0)

    @property
    def fetched_bytes(self) -> int:
        """Return the bytes to download from the Hub."""
        return sum(stage.fetches for stage in self.stages)

    @property
    def cached_bytes(self) -> int:
        """Return the downloaded bytes that stay in the Hub's cache."""
        return sum(stage.caches for stage in self.stages)

    @property
    def uploaded_bytes(self) -> int:
        """Return the bytes to upload to the Hub."""
        return sum(stage.uploads for stage in self.stages)


def make_plan(
    config: Config, device: str | None = None, runs: Path = Path("runs"), read_rows: bool | None = None
) -> Plan:
    """Return the plan of a configuration, without writing anything or downloading weights.

    Args:
        device: the name of a GPU to plan for; None for this machine.
        runs: the folder of the runs, for its free space.
        read_rows: read every row of the data; by default only those of a small local file.

    Raises:
        UserError: if the model, the data or the device does not exist.
    """
    machine = gpu_by_name(device) if device else this_machine(runs)
    sizes = read_sizes(config.model)
    data, second_steps = None, None
    if isinstance(config, TrainingRun):
        check_length(config.train.max_length, sizes.context)
        if config.train.adapts:
            check_targets(config.train.lora, sizes.linear)
        data = data_size(config, read_rows)
        if config.train.preference:
            second = config.preference_run()
            second_steps = steps(second.data, second.train, data_size(second, read_rows))
    for spec in config.quantize.variants:
        check_experts(spec, sizes.linear)
        check_patterns(spec, sizes.linear)
    given = None
    if config.merge.adapter:
        given = sum(tensor.numel for tensor in adapter_sizes(config.merge.adapter).values())

    def lay_out(asked: Config) -> tuple[int, list[Stage], list[Shortage]]:
        adapter = given if given is not None else adapter_parameters(sizes, asked.train)
        fetched = data.fetched_bytes if data else 0
        stages = stages_of(asked, sizes, machine, fetched, adapter if asked.merges else 0)
        return adapter, stages, shortages(stages, machine)

    adapter, stages, short = lay_out(config)
    changes = advise(config, lambda asked: bool(lay_out(asked)[2])) if short else []
    planned_steps = steps(config.data, config.train, data) if config.data and data else None
    speeds, why_not = _speeds(machine)
    seconds = timing.seconds(speeds, config, sizes, stages, planned_steps, second_steps) if speeds else {}
    return Plan(
        config, machine, sizes, data, adapter if config.merges else 0, planned_steps, stages, short, changes, seconds,
        why_not, second_steps,
    )  # fmt: skip


def shortages(stages: Sequence[Stage], machine: Machine) -> list[Shortage]:
    """Return the shortages of memory and disk, stage by stage; unknown sizes of the machine never fall short."""
    found = []
    for stage in stages:
        for what, need, have in (
            ("GPU memory", memory.wanted(stage.gpu), machine.gpu_bytes),
            ("main memory", memory.wanted(stage.host), machine.host_bytes),
        ):
            if have is not None and need > have:
                found.append(Shortage(stage.name, what, need, have))
    cached = 0
    for stage, (_, lying) in zip(stages, disk_peaks(stages), strict=True):
        cached += stage.caches
        need = lying + (cached if machine.one_disk else 0)
        if machine.disk_free is not None and need > machine.disk_free:
            found.append(Shortage(stage.name, "disk", need, machine.disk_free))
            break
    if machine.cache_free is not None and not machine.one_disk and cached > machine.cache_free:
        found.append(Shortage("fetching", "disk of the Hub's cache", cached, machine.cache_free))
    return found


def _speeds(machine: Machine) -> tuple[Speeds | None, str | None]:
    """Return the speeds measured on the machine, or the reason that there are none."""
    if not machine.is_here:
        return None, "no times: the speed of that machine was not measured"
    found = read_speeds()
    if found is not None and found.place == machine.name:
        return found, None
    why = "has changed" if found else "was not measured yet"
    return None, f"no times: this machine {why}. Try: {command('doctor', '--calibrate')}"
