"""The models of the accuracy benchmark: how each is made, what that takes, and what was measured of it.

Each of our variants is made in a run of its own, so that its seconds and its memory are its own. The run begins as a
copy of the one that measured the full-precision model. Files of llama.cpp's quantizer are measured by the same
functions on the same tokens. All that is finished is kept, and done once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accuracy_ways import Way
from process_memory import Watch, stage_of
from rich.console import Console

from pipeline.config.schema import Config
from pipeline.errors import ModelError, StageFailed
from pipeline.evaluation.model_result import ModelResult, Quality, VariantSettings
from pipeline.evaluation.results import Results
from pipeline.system.files import empty_folder, read_json, write_json
from pipeline.workflow.stage_process import Report, run_stage
from pipeline.workflow.stages import REPORTING
from pipeline.workflow.workspace import Workspace

BASE = "base"
COPIED = ("ledger.json", "results.json", "config.yaml", "measurements")  # what a run begins with


@dataclass(frozen=True)
class Row:
    """One way to store the model.

    Attributes:
        label: its name in tables.
        kind: its quality, or how the other quantizer made it; it gets a marker in the picture.
        result: the figures on general text.
        folder: its files; None if they were not kept.
        making: seconds and peak bytes by the step that took them; empty for the full-precision model.
        bits: stored bits a weight, of linear layers and of tables.
        second: the figures on the second text, if there is one.
        tried: True for a fallback that was not taken.
        is_peer: True if another quantizer made it.
    """

    label: str
    kind: str
    result: ModelResult
    folder: Path | None = None
    making: dict[str, dict] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    second: Quality | None = None
    tried: bool = False
    is_peer: bool = False


class Costs:
    """A way to run stages that keeps, in a file, the seconds and the peak memory of those that make a variant."""

    def __init__(self, path: Path):
        self._path = path
        self._here: set[str] = set()

    def __call__(self, stage: str, *arguments: Any) -> Report:
        """Run one stage to its end, as `run_stage` does."""
        if REPORTING[stage].verb != "quantize" or stage == "measure_variant":
            return run_stage(stage, *arguments)
        before = read_json(self._path, {})
        known = before.get(stage, {}) if stage in self._here or "seconds" not in before.get(stage, {}) else {}
        write_json(self._path, before | {stage: known | {"resumed": True}})  # it stays if this is killed
        with Watch(os.getpid(), stage_of) as watch:
            report = run_stage(stage, *arguments)
        peak = max(known.get("peak_memory_bytes") or 0, watch.peaks.get(stage, 0)) or None
        taken = {"seconds": known.get("seconds", 0) + report.seconds, "peak_memory_bytes": peak}
        write_json(self._path, before | {stage: taken | {"resumed": known.get("resumed", False)}})
        self._here.add(stage)
        return report


def make_base(config: Config, output: Path, console: Console) -> Workspace:
    """Measure the model in full precision, unless that is done, and return its run."""
    from pipeline.cli.terminal import TerminalReporter
    from pipeline.workflow.run import run_one

    return run_one(config, "evaluate", output / BASE, reporter=TerminalReporter(console))


def base_folder(base: Workspace) -> Path:
    """Return the folder of the full-precision model."""
    known = base.read_ledger().base
    assert known, "it was measured"
    return Path(known.folder)


def make_way(way: Way, config: Config, base: Workspace, output: Path, console: Console) -> tuple[Workspace, list[Row]]:
    """Make and measure one of our variants.

    Returns:
        Its run, and its row; then rows for the fallbacks that were tried.

    Raises:
        UserError: if anything fails but a gate.
    """
    from pipeline.cli.terminal import TerminalReporter
    from pipeline.workflow.run import run
    from pipeline.workflow.stages.quantize import files_of

    root = output / way.slug
    if not (root / config.name).exists():
        begin_from(base, root / config.name)
    failure = None
    try:
        run(config, root, reporter=TerminalReporter(console), start=Costs(root / "making.json"))
    except StageFailed as problem:  # raised for a variant that is withheld, too
        failure = problem
    workspace, (spec,) = Workspace(root / config.name), config.quantize.variants
    result = Results.read(workspace.results_path).variants.get(spec.name)
    if failure and result is None:
        raise failure
    assert result, "it was measured"
    label = " ".join(filter(None, (settings_label(result.variant), way.quality, way.asked)))
    kind, folder = way.quality or config.quantize.quality, files_of(workspace, spec.name)[0].parent
    found = [Row(label, kind, result, folder, read_json(root / "making.json", {}))]
    for other in result.gate.tried if result.gate else ():
        if other.variant != result.variant:
            found.append(Row(settings_label(other.variant), kind, other, tried=True))
    return workspace, found


def begin_from(base: Workspace, folder: Path) -> None:
    """Copy the measurement of the full-precision model into the folder of a new run, or nothing."""
    partial = empty_folder(folder.with_name(f"{folder.name}.partial"))
    for name in COPIED:
        if (source := base.folder / name).is_dir():
            shutil.copytree(source, partial / name)
        elif source.exists():
            shutil.copyfile(source, partial / name)
    os.replace(partial, folder)


def settings_label(variant: VariantSettings | None) -> str:
    """Return a label such as `int4 g32 hqq embeddings int8`."""
    if variant is None:
        return "unknown"
    parts = [variant.name, f"g{variant.group_size}" if variant.group_size else "", variant.rounding]
    parts.append("embeddings int8" if variant.embeddings == "int8" else "")
    parts.append(f"{len(variant.int8)} layers int8" if variant.int8 else "")
    parts += [f"{len(layers)} layers g{size}" for size, layers in variant.group_sizes.items()]
    return " ".join(filter(None, parts))


def silent(done: int, total: int, what: str) -> None:
    """Show no progress."""


def stored_bits(folder: Path, model: Path) -> dict[str, float]:
    """Return the stored bits a weight of the linear layers, and of the embedding with the output head.

    Args:
        folder: the files of a variant, or one GGUF.
        model: the full-precision model.

    Raises:
        ModelError: if a matrix is not found in the files.
    """
    from pipeline.models.matrices import linear_weights, table_weights

    sizes = _bytes_by_matrix(folder, model)
    found = {}
    for kind, shapes in (("layers", linear_weights(model)), ("tables", table_weights(model))):
        if missing := sorted(shapes.keys() - sizes.keys()):
            raise ModelError(f"{folder}: has no {missing[0]}")
        weights = sum(rows * columns for rows, columns in shapes.values())
        found[kind] = 8 * sum(sizes[name] for name in shapes) / weights
    return found


def _bytes_by_matrix(folder: Path, model: Path) -> Mapping[str, int]:
    from pipeline.inference.loaders import only_file
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.gguf_metadata import read_header
    from pipeline.models.matrices import linear_weights, table_weights
    from pipeline.models.safe_loading import open_config
    from pipeline.quantization.formats.gguf.names import architecture, stored_names

    names = [*linear_weights(model), *table_weights(model)]
    if file := only_file(folder):
        config, stored = open_config(model), read_header(file).tensors
        targets = stored_names(architecture(config.model_type), config.num_hidden_layers, names)
        return {name: stored[target].nbytes for name, target in targets.items() if target in stored}
    sizes: dict[str, int] = {}
    for name, tensor in Checkpoint(folder).items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "bias":  # the parts of a weight: codes, scales and zeros
            sizes[f"{layer}.weight"] = sizes.get(f"{layer}.weight", 0) + tensor.nbytes
    return sizes
