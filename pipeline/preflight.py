"""What can be found wrong before any work."""

from __future__ import annotations

from pipeline import data, models
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.launch import Launch, share
from pipeline.stages import quantize


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
    from pipeline.trackers.trackio import check as check_tracking

    if launch:
        if config.data is None:
            raise ConfigError("--accelerate: this configuration has no data, so there is nothing to train")
        share(config, launch.processes)
    if need_inputs:
        models.check_source(config.model)
        quantize.check_extras(config)
        if config.merge.adapter:
            models.check_adapter(config.merge.adapter)
        if config.evaluate:
            data.general_text(config.evaluate.general)
            _check_device(config.evaluate.device)
    if config.data and need_data:
        data.check_source(config.data)
    check_tracking(config.track)
    if config.data and config.train.method == "lora" and config.merge.base == "nf4":
        raise ConfigError("merge.base nf4: train.method lora never saw NF4 weights; use auto or bf16")
    if need_hub and config.publish.repo:
        from pipeline.hub import check_access, check_destination

        for repo in (config.publish.repo, *config.publish.mirrors.values()):
            check_access(repo, config.publish.create_pr)
        check_destination(config.publish.repo, config.name)


def _check_device(name: str) -> None:
    """Raise where a device that was named is not there; `auto` and `cpu` are, and need no heavy import to be found."""
    if name not in ("auto", "cpu"):
        from pipeline.loading import device_named

        device_named(name)
