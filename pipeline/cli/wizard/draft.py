"""The unfinished configuration of the wizard, and whether it fits this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline.config.engines import TRANSFORMERS
from pipeline.config.loader import parse_config
from pipeline.config.schema import Config, TrainingRun
from pipeline.data.sources import BUILTIN
from pipeline.errors import ConfigError
from pipeline.models.context import check_length
from pipeline.planning import timing
from pipeline.planning.advice import advise
from pipeline.planning.benchmark import read_speeds
from pipeline.planning.devices import Machine, this_machine
from pipeline.planning.model import Sizes
from pipeline.planning.plan import Shortage, shortages
from pipeline.planning.report import tell_shortage
from pipeline.planning.stages import Stage, stages_of
from pipeline.planning.training_memory import adapter_parameters
from pipeline.system.command_names import command

Settings = Mapping[str, object]  # dotted keys
PREPARING = ("allocate", "calibrate", "distill")  # stages whose time depends on the quality and the targets


@dataclass
class Draft:
    """The configuration with the answers so far.

    Attributes:
        runs: folder of the runs.
        tell: shows a line of text.
        secret: reads a secret without echo, "" for none; None without a terminal.
        confirm: asks yes or no; None without a terminal.
        given: answers of the command line, by the names of the questions. A wrong one ends the wizard.
        remembered: answers of an earlier session. At a terminal, a wrong one is asked again.
        overwrite: an existing configuration file may be replaced.
        tree: the configuration as plain data, from the recipe and the answers.
        sizes: of the base model.
        recipe: the shipped recipe that was chosen.
        profile: key of `presets.PROFILES`.
        quantizes: quantized models are made.
        place: where they will run; key of `presets.PLACES` of the configuration.
        columns_problem: why no form fits the data set; None after its columns are named.
        written: the configuration's file.
        too_large: the run does not fit this machine.
        start: start the run now.
    """

    runs: Path
    tell: Callable[[str], None]
    secret: Callable[[str], str] | None = None
    confirm: Callable[[str], bool] | None = None
    given: dict[str, str] = field(default_factory=dict)
    remembered: dict[str, str] = field(default_factory=dict)
    overwrite: bool = False
    tree: dict = field(default_factory=dict)
    sizes: Sizes | None = None
    recipe: str | None = None
    profile: str = "standard"
    quantizes: bool = True
    place: str = TRANSFORMERS
    columns_problem: str | None = None
    written: Path | None = None
    too_large: bool = False
    start: bool = False

    @property
    def is_recipes_data(self) -> bool:
        """Return True if the data set is that of the recipe."""
        return self.recipe is not None and self.tree["data"]["source"] == BUILTIN

    @property
    def model_sizes(self) -> Sizes:
        """Return the sizes of the base model, known after the first question."""
        assert self.sizes is not None, "the model is asked for first"
        return self.sizes

    @property
    def interactive(self) -> bool:
        """Return True if somebody can be asked."""
        return self.secret is not None

    def is_known(self, name: str) -> bool:
        """Return True if this question was answered on the command line or in an earlier session."""
        return name in self.given or name in self.remembered

    def command(self, *words: object) -> str:
        """Return a command to type, with this folder of runs."""
        return command(*words, *([] if self.runs == Path("runs") else ["--runs", self.runs]))

    @cached_property
    def machine(self) -> Machine:
        """Return the resources of this machine, read once."""
        return this_machine(self.runs)

    def config(self, settings: Settings | None = None) -> TrainingRun:
        """Return the configuration with further settings; open questions have their defaults.

        Raises:
            ConfigError: if a setting is refused.
        """
        tree = {"name": "unnamed", "data": {"source": BUILTIN}, **_changed(self.tree, settings or {})}
        config = parse_config(tree, "wizard")
        assert isinstance(config, TrainingRun), "the wizard always names a data set"
        return config

    def set(self, settings: Settings) -> None:
        """Store settings.

        Raises:
            ConfigError: if one is refused; then none is stored.
        """
        self.config(settings)
        self.tree = _changed(self.tree, settings)

    def fits(self, config: Config) -> bool:
        """Return True if this machine has the memory and the disk for a run."""
        return not self._short(config)

    def check_fits(self, config: Config) -> None:
        """Check that the model takes sequences of this length, and that this machine has the memory and the disk.

        Raises:
            ConfigError: naming the shortage, and settings that help.
        """
        check_length(config.train.max_length, self.model_sizes.context)
        short = self._short(config)
        if not short:
            return
        first = tell_shortage(short[0])
        if changes := advise(config, lambda asked: not self.fits(asked)):
            raise ConfigError(f"{first}. Try: {' '.join(change.setting for change in changes)}")
        raise ConfigError(f"{first}, whatever the settings. Try: a smaller model, or a larger machine")

    def fitting(self, settings: Settings) -> dict[str, object]:
        """Return these settings, with changes that make the run fit the model's context and this machine.

        Raises:
            ConfigError: if no changes make it fit.
        """
        config, context = self.config(settings), self.model_sizes.context
        if context is not None and config.train.max_length > context:
            settings = {**settings, "train.max_length": context}
            config = self.config(settings)
        if self.fits(config):
            return dict(settings)
        changes = advise(config, lambda asked: not self.fits(asked))
        if not changes:
            self.check_fits(config)
        return {**settings, **{change.key: change.value for change in changes}}

    def preparing_seconds(self, config: Config) -> float | None:
        """Return the time of the stages that prepare variants; None if this machine was not measured."""
        speeds = read_speeds()
        if speeds is None or speeds.place != self.machine.name:
            return None
        stages = [stage for stage in self._stages(config) if stage.name in PREPARING]
        return sum(timing.seconds(speeds, config, self.model_sizes, stages, None).values())

    def _short(self, config: Config) -> list[Shortage]:
        return shortages(self._stages(config), self.machine)

    def _stages(self, config: Config) -> list[Stage]:
        adapter = adapter_parameters(self.model_sizes, config.train)
        return stages_of(config, self.model_sizes, self.machine, 0, adapter)


def _changed(tree: dict, settings: Settings) -> dict:
    tree = copy.deepcopy(tree)
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = copy.deepcopy(value)
    return tree
