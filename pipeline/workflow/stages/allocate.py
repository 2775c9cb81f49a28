"""Stage `allocate`: the settings of variants with a target, chosen by what each layer loses.

Losses are measured once, on calibration text, and kept in the ledger: another target needs only another choice. If a
variant misses its gate, `next_try` corrects the losses by what was measured, and chooses again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import EIGHT_BITS, KEEP
from pipeline.config.schema import Config, VariantSpec
from pipeline.errors import ConfigError
from pipeline.evaluation.gates import distance, limits
from pipeline.evaluation.model_result import ModelResult
from pipeline.system.files import empty_folder, fingerprint
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome, calibrate, calibration_text
from pipeline.workflow.stages.inputs import device_name, full_model
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.quantization.allocation import Allocation
    from pipeline.quantization.calibration.sensitivities import Sensitivities
    from pipeline.quantization.target import Choice

KEY = "allocate"
TRIES = 3  # ways to make a variant that its gate may judge
WORTH = 0.05  # of the bytes: a smaller variant is tried if it saves more, after the first passed


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {"tokens": config.quantize.calibration.tokens}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    return {name: _about(config, workspace, name) for name in config.quantize.targeted}


def _about(config: Config, workspace: Workspace, name: str) -> str:
    """Return the fingerprint of what the choice for a variant depends on."""
    return fingerprint([_asked(config, name), _measured_by(config, workspace, name)])


def _asked(config: Config, name: str) -> dict:
    """Return the settings of a variant and its target, as plain data."""
    return {**config.quantize.spec(name).model_dump(mode="json"), "gate": limits(config.quantize, name)}


def _measured_by(config: Config, workspace: Workspace, name: str) -> str:
    """Return the fingerprint of what the losses of layers depend on."""
    spec = config.quantize.spec(name)
    how = {"rounding": spec.rounding, "calibrates": config.quantize.calibrates, "packing": spec.packing, "name": name}
    return fingerprint([how, calibrate.collected_with(config, workspace)])


def check(config: Config) -> None:
    """Raise an error if a variant has a target, and its layers cannot be measured.

    Raises:
        ConfigError: with the key to set.
    """
    for name in config.quantize.targeted:
        if not config.quantize.calibration.sources and config.data is None:
            raise ConfigError(
                f"quantize.variants {name}: a target needs calibration text, and there is no training data. "
                "Try: quantize.calibration.source=FILE.txt (--calibration-text FILE.txt)"
            )
        if config.model.low_disk:
            raise ConfigError(f"quantize.variants {name}: a target needs the whole model. Try: no model.low_disk")


def check_reachable(config: Config, model: Path) -> None:
    """Raise an error if a target is smaller than the smallest variant of this model; no weights are read.

    Raises:
        ConfigError: with the nearest size.
    """
    for name in config.quantize.targeted:
        _choice(config, model, name).check_reachable()


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Choose the settings of every variant that has a target."""
    chosen = {}
    for name in config.quantize.targeted:
        about = _about(config, workspace, name)
        known = workspace.progress(KEY, name)
        if known.get("about") != about:
            source = full_model(config, workspace, events)
            choice = _choice(config, source, name, _sensitivities(config, workspace, events, name, source))
            spec, made = choice.first()
            known = {"about": about, "asked": _asked(config, name), "tries": [], **_chosen(spec, made)}
            events.show([f"{name}: {choice.described(spec, made)}"])
            workspace.note(KEY, **{name: known})
        chosen[name] = len(known["chosen"][EIGHT_BITS])
    return Outcome((), {f"{name}_layers_in_eight_bits": count for name, count in chosen.items()})


def allocated(config: Config, workspace: Workspace) -> Config:
    """Return the configuration with the settings that were chosen for variants with a target."""
    specs = []
    for spec in config.quantize.variants:
        known = workspace.progress(KEY, spec.name) if spec.target else {}
        is_chosen = bool(known) and known["asked"] == _asked(config, spec.name)
        specs.append(spec.model_copy(update=known["chosen"]) if is_chosen else spec)
    return config.model_copy(update={"quantize": config.quantize.model_copy(update={"variants": specs})})


def about(workspace: Workspace, spec: VariantSpec) -> dict:
    """Return the target of a variant and the expected loss, for cards."""
    assert spec.target, "asked for variants with a target only"
    return {"target": spec.target.asked, "expected_kl": workspace.progress(KEY, spec.name)["loss"]}


def tried(workspace: Workspace, name: str) -> list[ModelResult]:
    """Return the results of all settings that were measured, in order."""
    return [ModelResult.model_validate(one["result"]) for one in workspace.progress(KEY, name).get("tries", ())]


def note_try(workspace: Workspace, name: str, result: ModelResult) -> list[ModelResult]:
    """Record the verdict on the present settings, and return the results of all tries."""
    known = workspace.progress(KEY, name)
    short = ModelResult(size_bytes=result.size_bytes, quality=result.quality, variant=result.variant, gate=result.gate)
    one = {key: known[key] for key in ("chosen", "loss")} | {"result": short.to_json()}
    others = [other for other in known["tries"] if other["chosen"] != known["chosen"]]
    workspace.note(KEY, **{name: known | {"tries": [*others, one]}})
    return tried(workspace, name)


def is_first(workspace: Workspace, name: str) -> bool:
    """Return True if the present settings of a variant were the first choice for its target."""
    known = workspace.progress(KEY, name)
    return not known["tries"] or known["tries"][0]["chosen"] == known["chosen"]


def next_try(workspace: Workspace, events: Events, name: str, full: Path) -> bool:
    """Choose other settings after a verdict, if that may help.

    After a miss, the target is corrected by how far it was missed. After a first pass by far, a smaller variant is
    tried; if that misses, the first is made again.

    Args:
        full: folder of the full-precision model.

    Returns:
        True if there are other settings to make and measure.
    """
    config = workspace.config()  # as asked for, without the present choice
    spec = config.quantize.spec(name)
    if not (spec.target and spec.target.rise):
        return False
    known = workspace.progress(KEY, name)
    tries, last = known["tries"], known["tries"][-1]
    verdict = ModelResult.model_validate(last["result"]).verdict
    if not all(check.has_error for check in verdict.checks):
        return False  # because no other settings could pass on these texts
    passed = [one for one in tries if one["result"]["gate"]["passed"]]
    if passed and not verdict.passed:
        workspace.note(KEY, **{name: known | {key: passed[-1][key] for key in ("chosen", "loss")}})
        events.show([f"{name}: the smaller try misses its gate, so the one before is made again"])
        return True
    if len(tries) >= TRIES or (verdict.passed and len(tries) > 1):
        return False
    from pipeline.quantization.target import MARGIN

    choice = _choice(config, full, name, _known_sensitivities(config, workspace, name))
    reached = max(distance(verdict), 0.01)
    other, made = choice.within(max(last["loss"], 1e-9) * MARGIN / reached)
    if any(_settings(other) == one["chosen"] for one in tries):
        return False
    if verdict.passed and choice.bytes(other) > (1 - WORTH) * (last["result"]["size_bytes"] or 0):
        return False
    why = "passes by far" if verdict.passed else "misses its gate"
    events.show([f"{name}: try {len(tries)} {why}. Next: {choice.described(other, made)}"])
    workspace.note(KEY, **{name: known | _chosen(other, made)})
    return True


def _chosen(spec: VariantSpec, made: Allocation) -> dict:
    return {"chosen": _settings(spec), "loss": made.loss}


def _settings(spec: VariantSpec) -> dict:
    """Return the settings that an allocation chooses, as plain data."""
    return {key: getattr(spec, key) for key in ("group_size", "group_sizes", "embeddings", EIGHT_BITS, KEEP)}


def _sensitivities(config: Config, workspace: Workspace, events: Events, name: str, source: Path) -> Sensitivities:
    """Return the losses of layers; measure them unless the ledger has them."""
    from pipeline.evaluation.sensitivity import measured
    from pipeline.models.matrices import refuse_other_matrices
    from pipeline.quantization.calibration.sensitivities import MOMENTS_TOKENS, grids_to_mix

    about = _measured_by(config, workspace, name)
    if workspace.progress(KEY, f"{name} losses").get("about") == about:
        return _known_sensitivities(config, workspace, name)
    choice, calibrates = _choice(config, source, name), config.quantize.calibrates
    choice.check_reachable()
    refuse_other_matrices(source)
    tokens = min(MOMENTS_TOKENS, config.quantize.calibration.tokens)
    windows = calibration_text.windows(config, workspace, source, tokens)
    scratch = empty_folder(workspace.folder / KEY)
    try:
        grids, tables = grids_to_mix(choice.spec, choice.linear), choice.tables
        found = measured(
            choice.spec, calibrates, source, grids, tables, windows, scratch, events.progress, device_name(config)
        )
    finally:
        shutil.rmtree(scratch)
    kept = {"about": about, "shares": found.shares, "errors": found.errors, "fused": found.fused}
    workspace.note(KEY, **{f"{name} losses": kept})
    return found


def _known_sensitivities(config: Config, workspace: Workspace, name: str) -> Sensitivities:
    from pipeline.quantization.calibration.sensitivities import Sensitivities

    known = workspace.progress(KEY, f"{name} losses")
    return Sensitivities(known["shares"], known["errors"], known["fused"])


def _choice(config: Config, full: Path, name: str, losses: Sensitivities | None = None) -> Choice:
    from pipeline.quantization.target import Choice

    return Choice(config.quantize.spec(name), limits(config.quantize, name), full, losses, config.merges)
