"""Checks before a run starts."""

from __future__ import annotations

from pipeline import data
from pipeline.config.schema import Config, TrainingRun
from pipeline.config.training_catalog import METHODS, TRAINERS
from pipeline.errors import ConfigError, MissingExtra
from pipeline.models import sources
from pipeline.publishing.removal import NO_REMOVAL, Removal
from pipeline.system import hardware
from pipeline.system.libraries import is_installed
from pipeline.tracking import trackers
from pipeline.training.accelerate_launch import Launch, split_step
from pipeline.workflow.stages import calibration_text, quantize


def preflight(
    config: Config,
    need_inputs: bool = True,
    need_data: bool = True,
    need_hub: bool = True,
    launch: Launch | None = None,
    removal: Removal = NO_REMOVAL,
) -> None:
    """Check everything that can be checked before a run starts.

    Args:
        need_inputs: check the model, the texts and the packages that write variants.
        need_data: check the training data.
        need_hub: check access to the repositories that are published to.
        launch: the processes that training is divided among.
        removal: variants and files of the repository that may be removed.

    Raises:
        UserError: for the first problem.
    """
    hardware.check_compute_dtype()
    check_shared(config, launch)
    check_inputs(config, need_inputs, need_data)
    if config.data and need_data:
        check_training_here(config)
    if need_inputs:
        quantize.check_extras(config)
        if config.evaluate:
            _check_device(config.evaluate.device)
    trackers.check(config.track)
    if need_hub and config.publish.repo:
        from pipeline.hub.auth import check_access
        from pipeline.publishing.commit import check_destination

        for repo in (config.publish.repo, *config.publish.mirrors.values()):
            check_access(repo, config.publish.create_pr)
        asked = [spec.name for spec in config.quantize.variants]
        check_destination(config.publish.repo, config.name, asked=asked, removal=removal)


def check_inputs(config: Config, need_model: bool = True, need_data: bool = True) -> None:
    """Check the configuration, the model, the texts and the data, but nothing that differs between machines.

    Raises:
        UserError: for the first problem.
    """
    train = config.train
    if need_data and isinstance(config, TrainingRun) and (train.options or train.lora.options or train.preference):
        from pipeline.training.options import check_options

        check_options(config)
    if need_model:
        sources.check_source(config.model)
        if config.merge.adapter:
            sources.check_adapter(config.merge.adapter)
        if config.evaluate:
            data.general_text(config.evaluate.general)
        calibration_text.check_sources(config)
    if config.data and need_data:
        data.check_source(config.data)
        if config.train.preference:
            data.check_source(config.train.preference.data)
    bases = METHODS[config.train.method].merge_bases
    if config.data and config.merge.base not in ("auto", *bases):
        raise ConfigError(
            f"merge.base {config.merge.base}: train.method {config.train.method} does not train on this base. "
            f"Try: --set merge.base={bases[0]}"
        )


def check_training_here(config: Config) -> None:
    """Check the settings of training that need a GPU or another package on this machine.

    Raises:
        UserError: for the first problem.
    """
    train = config.train
    needs = (
        ("train.attention flash", train.attention == "flash", "flash_attn", "flash"),
        ("train.liger", train.liger, "liger_kernel", "liger"),
        ("train.compile", train.compile, "torch", ""),
    )
    for key, is_set, package, extra in needs:
        if is_set and not _has_cuda():
            raise ConfigError(f"{key}: needs an NVIDIA GPU with CUDA, and this machine has none. Try: without it")
        if is_set and not is_installed(package):
            raise MissingExtra(key, extra)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def check_shared(config: Config, launch: Launch | None) -> None:
    """Raise if training cannot be divided among the processes of `launch`.

    Raises:
        ConfigError: if it cannot, or the run has no training.
    """
    if launch and config.data is None:
        raise ConfigError("--accelerate: the configuration has no data, so nothing is trained. Try: without it")
    if launch and not config.train.adapts:
        raise ConfigError(
            f"--accelerate: train.method {config.train.method} trains in one process only. Try: without it"
        )
    if launch:
        split_step(config, launch.processes)
        second = config.train.preference
        for name in (config.train.trainer, *([second.trainer] if second else [])):
            if launch.processes > 1 and not TRAINERS[name].divides:
                raise ConfigError(f"--accelerate: the trainer {name} works in one process only. Try: without it")


def _check_device(name: str) -> None:
    """Raise if this machine does not have the device; `auto` and `cpu` always exist and need no heavy import."""
    if name not in ("auto", "cpu"):
        from pipeline.inference.load import device_named

        device_named(name)
