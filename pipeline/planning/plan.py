"""The plan of a configuration: what its stages take, what of it fits where, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.planning import memory, timing
from pipeline.planning.advice import Change, advise
from pipeline.planning.benchmark import Calibration, read_calibration
from pipeline.planning.data import DataSize, data_size, steps
from pipeline.planning.devices import Machine, named, this_machine
from pipeline.planning.model import Sizes, adapter_sizes, read_sizes
from pipeline.planning.stages import Stage, disk_peaks, stages_of
from pipeline.system.command_names import command

UNTIMED = ("publish",)  # takes the network's time


@dataclass(frozen=True)
class Shortage:
    """Something that there is not enough of; `have` and `need` in bytes."""

    stage: str
    what: str  # main memory, GPU memory, disk
    need: int
    have: int


@dataclass(frozen=True)
class Plan:
    """What a run of a configuration takes. Bytes and seconds; None where that is not known.

    Attributes:
        seconds: by stage, of those whose time is known; empty where nothing was measured on that machine.
        changes: settings with which everything fits; empty where it fits as it is, or with none that are known.
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

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def untimed(self) -> dict[str, str]:
        """The stages whose time is not known though the machine's speed is, each with the reason: `which ...`."""
        unknown = () if self.why_no_times else (s for s in self.stages if s.name not in self.seconds)
        return {s.name: s.untimed or "whose steps are not known" for s in unknown if s.name not in UNTIMED}

    @property
    def total_seconds(self) -> float | None:
        """Of the whole run without the network; None where that of one of its stages is not known."""
        return None if self.why_no_times or self.untimed else sum(self.seconds.values())

    @property
    def disk_bytes(self) -> int:
        """What lies in the run's folder at most, at one time."""
        return max((peak for _, peak in disk_peaks(self.stages)), default=0)

    @property
    def fetched_bytes(self) -> int:
        return sum(stage.fetches for stage in self.stages)

    @property
    def cached_bytes(self) -> int:
        return sum(stage.caches for stage in self.stages)

    @property
    def uploaded_bytes(self) -> int:
        return sum(stage.uploads for stage in self.stages)


def make_plan(config: Config, device: str | None = None, runs: Path = Path("runs")) -> Plan:
    """Look up sizes, and say what follows from them. Writes nothing, and fetches no weights.

    Args:
        device: a GPU by its name, of whatever machine; by default this machine.

    Raises:
        UserError: where the model or the data cannot be had, or no such device is known.
    """
    machine = named(device) if device else this_machine(runs)
    sizes = read_sizes(config.model)
    data = data_size(config.data) if config.data else None
    brought = None
    if config.merge.adapter:
        brought = sum(tensor.numel for tensor in adapter_sizes(config.merge.adapter).values())

    def lay_out(asked: Config) -> tuple[int, list[Stage], list[Shortage]]:
        adapter = brought if brought is not None else memory.adapter_parameters(sizes, asked.train.lora)
        fetched = data.fetched_bytes if data else 0
        stages = stages_of(asked, sizes, machine, fetched, adapter if asked.merges else 0)
        return adapter, stages, shortages(stages, machine)

    adapter, stages, short = lay_out(config)
    changes = advise(config, lambda asked: bool(lay_out(asked)[2])) if short else []
    planned_steps = steps(config.data, config.train, data) if config.data and data else None
    calibration, why_not = _calibration(machine)
    seconds = timing.seconds(calibration, config, sizes, stages, planned_steps) if calibration else {}
    return Plan(
        config, machine, sizes, data, adapter if config.merges else 0, planned_steps, stages, short, changes, seconds,
        why_not,
    )  # fmt: skip


def shortages(stages: Sequence[Stage], machine: Machine) -> list[Shortage]:
    """What there is not enough of, stage by stage; of what is not known, nothing is said."""
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


def _calibration(machine: Machine) -> tuple[Calibration | None, str | None]:
    """What was measured on this machine, or why there is nothing."""
    if not machine.is_here:
        return None, "no times, for nothing was measured on that machine"
    found = read_calibration()
    if found is None:
        return None, f"no times, for nothing was measured here yet; run: {command('doctor', '--calibrate')}"
    if not found.is_of(machine.name):
        return None, f"no times, for this machine has changed; run: {command('doctor', '--calibrate')}"
    return found, None
