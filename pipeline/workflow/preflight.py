"""What can be found wrong before any work."""

from __future__ import annotations

from pipeline import data
from pipeline.config.schema import Config
from pipeline.config.training_catalog import METHODS
from pipeline.errors import ConfigError
from pipeline.models import sources
from pipeline.system import hardware
from pipeline.tracking.trackers import tracker
from pipeline.training.accelerate_launch import Launch, split_step
from pipeline.workflow.stages import quantize


def preflight(
    config: Config,
    need_inputs: bool = True,
    need_data: bool = True,
    need_hub: bool = True,
    launch: Launch | None = None,
) -> None:
    """Everything that can be found wrong before any work.

    Raises:
        UserError: naming it.
    """
    hardware.check_compute_dtype()
    check_shared(config, launch)
    check_inputs(config, need_inputs, need_data)
    if need_inputs:
        quantize.check_extras(config)
        if config.evaluate:
            _check_device(config.evaluate.device)
    tracker(config.track.tracker).check(config.track)
    if need_hub and config.publish.repo:
        from pipeline.hub.auth import check_access
        from pipeline.publishing.commit import check_destination

        for repo in (config.publish.repo, *config.publish.mirrors.values()):
            check_access(repo, config.publish.create_pr)
        check_destination(config.publish.repo, config.name)


def check_inputs(config: Config, need_model: bool = True, need_data: bool = True) -> None:
    """The configuration in itself, the model, the texts and the data; nothing that another machine could have.

    Raises:
        UserError: naming what is wrong.
    """
    if need_model:
        sources.check_source(config.model)
        if config.merge.adapter:
            sources.check_adapter(config.merge.adapter)
        if config.evaluate:
            data.general_text(config.evaluate.general)
    if config.data and need_data:
        data.check_source(config.data)
    bases = METHODS[config.train.method].merge_bases
    if config.data and config.merge.base not in ("auto", *bases):
        raise ConfigError(
            f"merge.base {config.merge.base}: train.method {config.train.method} never saw such weights; "
            f"use auto or {' or '.join(bases)}"
        )


def check_shared(config: Config, launch: Launch | None) -> None:
    """Can training be shared out as it is asked for?

    Raises:
        ConfigError: where it cannot, or where there is no training.
    """
    if launch and config.data is None:
        raise ConfigError("--accelerate: this configuration has no data, so there is nothing to train")
    if launch:
        split_step(config, launch.processes)


def _check_device(name: str) -> None:
    """Raise where a device that was named is not there; `auto` and `cpu` are, and need no heavy import to be found."""
    if name not in ("auto", "cpu"):
        from pipeline.inference.load import device_named

        device_named(name)
