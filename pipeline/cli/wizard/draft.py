"""The configuration as far as it is answered, what is known besides, and whether it fits this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline.config.loader import parse_config
from pipeline.config.schema import Config, TrainingRun
from pipeline.data.sources import BUILTIN
from pipeline.errors import ConfigError
from pipeline.planning.advice import advise
from pipeline.planning.devices import Machine, this_machine
from pipeline.planning.memory import adapter_parameters
from pipeline.planning.model import Sizes
from pipeline.planning.plan import Shortage, shortages
from pipeline.planning.report import tell_shortage
from pipeline.planning.stages import stages_of
from pipeline.system.command_names import command

Settings = Mapping[str, object]  # dotted keys


@dataclass
class Draft:
    """What was answered so far.

    Attributes:
        runs: folder of the runs.
        tell: shows a line of text.
        secret: reads a secret without showing it, "" for none; None where nobody sits at a terminal.
        confirm: asks yes or no; None there too.
        given: answers given ahead as options, by the questions' names; a wrong one ends the wizard.
        remembered: answers of an earlier session; at a terminal a wrong one is asked again.
        overwrite: a configuration file that is there may be replaced.
        tree: the configuration as plain data, with what was answered and what a recipe brought.
        sizes: of the base model.
        recipe: the shipped recipe that it began with.
        profile: key of `presets.PROFILES`.
        quantizes: quantized models are made.
        columns_problem: why no form was found for the data set, until its columns are named.
        written: the configuration's file.
        too_large: its plan does not fit this machine.
        start: the run begins now.
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
    columns_problem: str | None = None
    written: Path | None = None
    too_large: bool = False
    start: bool = False

    @property
    def is_recipes_data(self) -> bool:
        """Does it learn from what the recipe names?"""
        return self.recipe is not None and self.tree["data"]["source"] == BUILTIN

    @property
    def model_sizes(self) -> Sizes:
        """Return the sizes of the base model, which is the first question."""
        assert self.sizes is not None, "the model is asked for first"
        return self.sizes

    @property
    def interactive(self) -> bool:
        """Return True if somebody can be asked."""
        return self.secret is not None

    def is_known(self, name: str) -> bool:
        """Return True if the answer of this question is known beforehand."""
        return name in self.given or name in self.remembered

    def command(self, *words: object) -> str:
        """Return a command as people type it here, with this folder of runs."""
        return command(*words, *([] if self.runs == Path("runs") else ["--runs", self.runs]))

    @cached_property
    def machine(self) -> Machine:
        """Return what this machine has, measured once."""
        return this_machine(self.runs)

    def config(self, settings: Settings | None = None) -> TrainingRun:
        """Return the configuration with further settings. Open questions have their defaults.

        Raises:
            ConfigError: where a setting is refused.
        """
        tree = {"name": "unnamed", "data": {"source": BUILTIN}, **_changed(self.tree, settings or {})}
        config = parse_config(tree, "wizard")
        assert isinstance(config, TrainingRun), "the wizard always names a data set"
        return config

    def set(self, settings: Settings) -> None:
        """Keep settings.

        Raises:
            ConfigError: where one is refused; then none is kept.
        """
        self.config(settings)
        self.tree = _changed(self.tree, settings)

    def fits(self, config: Config) -> bool:
        """Return True if this machine has the memory and the disk for a run."""
        return not self._short(config)

    def check_fits(self, config: Config) -> None:
        """Raise an error if this machine lacks the memory or the disk for a run.

        Raises:
            ConfigError: naming what there is not enough of, and what helps.
        """
        short = self._short(config)
        if not short:
            return
        first = tell_shortage(short[0])
        if changes := advise(config, lambda asked: not self.fits(asked)):
            raise ConfigError(f"{first}; it would fit with {' '.join(change.setting for change in changes)}")
        raise ConfigError(f"{first}; no settings known here make it fit: take a smaller model, or a larger machine")

    def fitting(self, settings: Settings) -> dict[str, object]:
        """Return these settings, and those that make the run fit this machine.

        Raises:
            ConfigError: where none are known.
        """
        config = self.config(settings)
        if self.fits(config):
            return dict(settings)
        changes = advise(config, lambda asked: not self.fits(asked))
        if not changes:
            self.check_fits(config)
        return {**settings, **{change.key: change.value for change in changes}}

    def _short(self, config: Config) -> list[Shortage]:
        adapter = adapter_parameters(self.model_sizes, config.train.lora)
        return shortages(stages_of(config, self.model_sizes, self.machine, 0, adapter), self.machine)


def _changed(tree: dict, settings: Settings) -> dict:
    tree = copy.deepcopy(tree)
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = copy.deepcopy(value)
    return tree
