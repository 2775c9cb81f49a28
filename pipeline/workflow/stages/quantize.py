"""Stage `quantize`: the files of every requested variant, in one pass over the full-precision checkpoint.

They stay in `quantized/` until `pipeline.workflow.stages.measure_variant` has loaded and measured them. Valid files
are not made again, such as those that the merge made in its own pass.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import KEEP, VARIANTS
from pipeline.config.engines import misfits
from pipeline.config.schema import Config, MeasuredRun
from pipeline.errors import MissingExtra, QuantizationError
from pipeline.quantization.experts import layers_of
from pipeline.system.files import empty_folder, replace_folder, states
from pipeline.system.libraries import is_installed, versions
from pipeline.tracking.events import Events, one_line
from pipeline.workflow.stages import Outcome, allocate, calibrate, distill
from pipeline.workflow.stages.inputs import base_revision, full_model, made_from, shard_by_shard, text_depends
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantization.writer import VariantFiles, Variants


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event: settings that differ from the variant's defaults."""
    assert variant, "the events of this stage are about one variant each"
    spec = config.quantize.spec(variant)
    given = spec.model_dump(include={"group_size", "rounding", "embeddings", "packing"})
    unsaid = (None, KEEP, next(iter(spec.variant.packings), None))
    return {k: v for k, v in given.items() if v not in unsaid}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    measured = None
    if isinstance(config, MeasuredRun):
        measured = {"evaluate": config.evaluate.model_dump(), "general": text_depends(config, workspace)}
    return {
        "specs": [config.quantize.spec(v).making() for v in variants],
        **_calibration(config, workspace, variants),
        "measured": measured,
        "after": made_from(config, workspace),
        "versions": _versions(variants),
    }


def _calibration(config: Config, workspace: Workspace, variants: Sequence[str]) -> dict:
    """Return the dependencies of variants on calibration text; none if it plays no part in them."""
    if not set(variants).intersection([*config.quantize.calibrated, *config.quantize.targeted]):
        return {}
    found = {"calibration": calibrate.collected_with(config, workspace)}
    if set(variants).intersection(config.quantize.distilled):
        found["distillation"] = config.quantize.distillation.model_dump()
    return found


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Write the files of the variants that are missing or out of date."""
    from pipeline.models.matrices import quantizable_weights
    from pipeline.models.tensor_names import open_checkpoint

    source = full_model(config, workspace, events)
    missing = [name for name in variants if not _is_written(config, workspace, name, source)]
    refused: dict[str, str] = {}
    if missing:
        linear = quantizable_weights(source)
        order, refused = to_write(config, workspace, events, missing, source, linear)
        for name, problem in refused.items():
            events.failed("quantize", name, QuantizationError(problem))
        if order.specs:
            with shard_by_shard(config, workspace, events, source) as passing:
                # A streamed checkpoint reports its download, which is the slower part.
                tell = functools.partial(events.progress, what="rounding and writing") if passing is None else None
                made = order.make_of(source, tell, open_checkpoint(source, passing, to_copy=True))
            keep_written(config, workspace, made, source)
            for name, error in order.failed.items():
                shutil.rmtree(_partial(workspace, name), ignore_errors=True)
                events.failed("quantize", name, error)
            refused |= {name: one_line(error) for name, error in order.failed.items()}
    return Outcome((), {"made": [name for name in variants if name not in refused], "refused": refused})


def check_extras(config: Config) -> None:
    """Raise an error if a variant lacks calibration text, or a package that writes it.

    Raises:
        ConfigError: with the key to set.
        MissingExtra: with the package.
    """
    calibrate.check(config)
    allocate.check(config)
    for spec in config.quantize.variants:
        for module, extra in spec.requires:
            if not is_installed(module):
                raise MissingExtra(spec.name, extra)


def check_variants(config: Config, model: Path) -> None:
    """Raise before the training if the model cannot be stored as a requested variant.

    A layer that no group size divides is no error here: it prevents only one variant.

    Raises:
        ModelError: naming the part of the model that a format cannot store, or that cannot be calibrated.
        QuantizationError: if a pattern of a variant does not suit the layers of the model.
        MissingExtra: if a package that writes a variant is not installed.
    """
    from pipeline.models.matrices import quantizable_weights, refuse_other_matrices
    from pipeline.quantization.experts import check_experts
    from pipeline.quantization.fit import check_patterns
    from pipeline.quantization.formats import format_of

    linear = {}
    if config.quantize.variants:
        refuse_other_matrices(model)
        linear = quantizable_weights(model)
    for spec in config.quantize.variants:
        check_experts(spec, linear)
        check_patterns(spec, linear)
        format_of(spec).check(spec, model)
    if config.quantize.calibrated or config.quantize.targeted:
        from pipeline.quantization.calibration.blocks import BlockwiseModel
        from pipeline.quantization.calibration.check import check_blocks

        check_blocks(BlockwiseModel(model))
    allocate.check_reachable(config, model)


def to_write(
    config: Config,
    workspace: Workspace,
    events: Events,
    names: Sequence[str],
    model: Path,
    linear: Mapping[str, tuple[int, int]],
) -> tuple[Variants, dict[str, str]]:
    """Return the writer of these variants, and the reason for each variant that cannot be made.

    Raises:
        ModelError: if no variant of this model can be made.
    """
    from pipeline.models.matrices import refuse_other_matrices, table_weights
    from pipeline.quantization.writer import Variants, unfit

    for name in names:  # frees the space of an earlier attempt
        shutil.rmtree(workspace.quantized / name, ignore_errors=True)
    refuse_other_matrices(model)
    wanted = [config.quantize.spec(name) for name in names]
    refused = {spec.name: problem for spec in wanted if (problem := unfit(spec, linear, model))}
    specs = [spec for spec in wanted if spec.name not in refused]
    for spec in specs:
        for line in misfits(spec.variant.ways(spec.packing), *layers_of(spec, linear)):
            events.show([f"{spec.name} {line}"])
    tables = table_weights(model) if any(spec.quantizes_embeddings for spec in specs) else {}
    folders = {spec.name: empty_folder(_partial(workspace, spec.name)) for spec in specs}
    license = workspace.read_measurement("origin").get("license")
    tell = events.progress
    calibrated = calibrate.read(config, workspace, [spec.name for spec in specs])
    return Variants(
        specs,
        folders,
        linear,
        tables,
        name=config.name,
        license=license,
        tell=tell,
        statistics=calibrated.statistics,
        rounded=calibrated.rounded,
        equivalences=calibrated.smoothing,
    ), refused


def keep_written(config: Config, workspace: Workspace, made: Mapping[str, VariantFiles], model: Path) -> None:
    """Move finished files to their place, and record their inputs."""
    for name, files in made.items():
        replace_folder(_partial(workspace, name), workspace.quantized / name)
        weights = asdict(files) | _made_with(config, workspace, name)
        written = {"about": _about(config, workspace, name, model), "weights": weights}
        workspace.note(f"quantize/{name}", written=written)


def _made_with(config: Config, workspace: Workspace, name: str) -> dict:
    """Return the calibration, the distillation and the target of a variant, for cards."""
    found = calibrate.about(config, workspace) if name in config.quantize.calibrated else {}
    found |= distill.about(workspace, name) if name in config.quantize.distilled else {}
    return found | (allocate.about(workspace, config.quantize.spec(name)) if name in config.quantize.targeted else {})


def _is_written(config: Config, workspace: Workspace, name: str, model: Path) -> bool:
    """Return True if the files of a variant are complete and match the present settings and model."""
    written = workspace.progress(f"quantize/{name}", "written")
    is_as_asked = "instead" not in written  # by a fallback of an earlier version
    return is_as_asked and written.get("about") == _about(config, workspace, name, model)


def _about(config: Config, workspace: Workspace, name: str, model: Path) -> dict:
    from pipeline.models.checkpoint_files import companions

    return {
        "spec": config.quantize.spec(name).making(),
        **_calibration(config, workspace, (name,)),
        "versions": _versions((name,)),
        "revision": base_revision(config, workspace),
        "model": states([*sorted(model.glob("*.safetensors")), *model.glob("config.json"), *companions(model)]),
        "files": states(files_of(workspace, name)),
    }


def files_of(workspace: Workspace, name: str) -> list[Path]:
    """Return the newest files of a variant: in `quantized/` until they are measured, then in the release."""
    apart = workspace.quantized / name
    return sorted(apart.iterdir()) if apart.is_dir() else workspace.placed(f"quantize/{name}")


def is_released(workspace: Workspace, name: str) -> bool:
    """Return True if the newest files of a variant are in the release."""
    return not (workspace.quantized / name).is_dir() and bool(workspace.placed(f"quantize/{name}"))


def _versions(variants: Sequence[str]) -> dict[str, str]:
    return versions(*sorted({library for name in variants for library in VARIANTS[name].libraries}))


def _partial(workspace: Workspace, name: str) -> Path:
    return workspace.quantized / f"{name}.partial"
