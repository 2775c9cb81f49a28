"""Stage `measure_variant`: one variant, loaded back, measured, and released unless it misses its gate.

Without `evaluate` nothing is measured, there is no gate, and a GGUF is only opened. Measured figures are kept, so
that a changed limit needs only a new verdict.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Config, MeasuredRun
from pipeline.errors import GateError
from pipeline.evaluation.gates import best, corrections, describe_missed, judge, limits
from pipeline.evaluation.model_result import ModelResult, StoredWeights, VariantSettings
from pipeline.inference.loaders import only_file
from pipeline.models.checkpoint_files import stored_bytes
from pipeline.system.files import fingerprint, states
from pipeline.system.libraries import versions
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome, allocate, config_of, quantize
from pipeline.workflow.stages.inputs import full_model, model_bytes, run_texts
from pipeline.workflow.stages.quantize import files_of, parameters
from pipeline.workflow.workspace import Workspace

__all__ = ["depends", "is_withheld", "parameters", "run"]


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    found = _measured_by(config, workspace, variants)
    if config.evaluate:
        found["gate"] = [limits(config.quantize, name) for name in variants]
        found["on_gate_failure"] = config.quantize.on_gate_failure
    return found


def is_withheld(config: Config, workspace: Workspace, name: str) -> bool:
    """Return True if a variant with its present settings was measured and kept out of the release."""
    entry = workspace.ledger().get(f"quantize/{name}")
    if entry is None or "withheld" not in entry.summary:
        return False
    made_with = config_of("measure_variant", config, workspace)
    return workspace.holds(f"quantize/{name}", fingerprint(depends(made_with, workspace, (name,))))


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Measure one variant, judge it, and move its files into the release or out of it."""
    (name,) = variants
    full = full_model(config, workspace, events)
    source = model_bytes(config, workspace, full)
    result = _measured(config, workspace, events, name, full)
    refusal, missed = None, None
    if isinstance(config, MeasuredRun):
        result = _judged(config, workspace, name, result)
        if allocate.next_try(workspace, events, name, full):
            released = tuple(workspace.placed(f"quantize/{name}"))  # of an earlier run; they stay until the last try
            told = describe_missed(result.verdict) or "passes by far"
            return Outcome(released, {"made_again": told}, is_final=False)
        missed = None if result.verdict.passed else describe_missed(result.verdict)
        withheld = bool(missed) and config.quantize.on_gate_failure != "warn"
        if withheld and result.verdict.tried:
            result = _best_of(result)
            missed = describe_missed(result.verdict)
        result = result.changed(gate=result.verdict.model_copy(update={"withheld": withheld}))
        if withheld:
            refusal = GateError(f"withheld: {missed}{_told_of_tries(result)}")
    assert result.size_bytes is not None, "the files of a variant have a size"
    ratio = result.size_bytes / source
    result = result.changed(ratio=ratio)
    files = _leave_out(workspace, name) if refusal else _let_in(workspace, name)
    measured = workspace.write_measurement(name, result.to_json())
    summary = _summary(result, source, ratio)
    if missed:
        summary |= {"withheld": str(refusal)} if refusal else {"missed": missed}
    return Outcome((*files, measured), summary, refusal)


def _measured_by(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies of these variants' figures."""
    found = quantize.depends(config, workspace, variants)
    engines = {library for name in variants for library in VARIANTS[name].measured_with}
    if config.evaluate and engines:
        found["measured_in"] = versions(*sorted(engines))
    return found


def _measured(config: Config, workspace: Workspace, events: Events, name: str, full: Path) -> ModelResult:
    """Return the figures of a variant's files; measure them unless the ledger has figures of these files."""
    key = f"quantize/{name}"
    depends_on = fingerprint(_measured_by(config, workspace, (name,)))
    about = {"depends_on": depends_on, "files": states(files_of(workspace, name))}
    known, written = (workspace.progress(key, kind) for kind in ("measured", "written"))
    made = {
        "variant": VariantSettings(**config.quantize.spec(name).making()),
        "weights": StoredWeights(**written["weights"]),
    }
    if known.get("about") == about:
        return ModelResult.model_validate(known["result"]).changed(**made)
    folder = workspace.quantized / name
    if not folder.is_dir():
        workspace.take_back(key, workspace.release / VARIANTS[name].folder, folder)
    result = ModelResult(size_bytes=stored_bytes(folder))
    if isinstance(config, MeasuredRun):
        from pipeline.evaluation.evaluate import evaluate

        result = evaluate(name, folder, config, run_texts(workspace), events.progress, full)
    elif file := only_file(folder):
        _open(file)
        result = result.changed(file=file.name)
    workspace.note(key, measured={"about": about, "result": result.to_json()})
    return result.changed(**made)


def _judged(config: MeasuredRun, workspace: Workspace, name: str, result: ModelResult) -> ModelResult:
    """Return the result with its verdict, which allows for all settings that a target may lead to."""
    target = config.quantize.spec(name).target
    if target is None or target.rise is None:
        return result.changed(gate=judge(result.quality, limits(config.quantize, name)))
    tries = corrections(allocate.TRIES, allocate.is_first(workspace, name))
    result = result.changed(gate=judge(result.quality, limits(config.quantize, name), tries))
    tried = allocate.note_try(workspace, name, result)
    if len(tried) < 2:
        return result
    return result.changed(gate=result.verdict.model_copy(update={"tried": tuple(tried)}))


def _best_of(result: ModelResult) -> ModelResult:
    """Return the result of the try that came nearest to its limits, with all tries."""
    nearest = best(result.verdict.tried)
    return nearest.changed(gate=nearest.verdict.model_copy(update={"tried": result.verdict.tried}))


def _told_of_tries(result: ModelResult) -> str:
    tried = result.verdict.tried
    if len(tried) < 2:
        return ""
    return f"; that is the best of {len(tried)} ways to make it, and takes {result.size_bytes:,} bytes"


def _let_in(workspace: Workspace, name: str) -> list[Path]:
    """Move the files of a variant into the release if they are not there, and return their paths."""
    apart, key = workspace.quantized / name, f"quantize/{name}"
    if not apart.is_dir():
        return workspace.placed(key)
    return workspace.place(apart, workspace.release / VARIANTS[name].folder, key)


def _leave_out(workspace: Workspace, name: str) -> list[Path]:
    """Move the measured files of a variant out of the release."""
    apart, key = workspace.quantized / name, f"quantize/{name}"
    if apart.is_dir():
        workspace.remove(key, workspace.ledger().keys() - {key})
    else:
        workspace.take_back(key, workspace.release / VARIANTS[name].folder, apart)
    return []


def _summary(result: ModelResult, source: int, ratio: float) -> dict:
    return {
        "bytes_before": source,
        "bytes_after": result.size_bytes,
        "ratio": round(ratio, 4),
        **{f"{text}_perplexity": q.perplexity.value for text, q in result.quality.items() if q.perplexity},
        **{f"{text}_kl": q.kl.value for text, q in result.quality.items() if q.kl},
        **({"compute_dtype": result.compute_dtype} if result.compute_dtype else {}),
    }


def _open(file: Path) -> None:
    """Raise if llama.cpp does not open the file, or, if llama.cpp is not installed, if the file is not whole."""
    from pipeline.inference import llama_cpp
    from pipeline.models.gguf_metadata import read_header

    if llama_cpp.is_installed():
        llama_cpp.check(file)
    else:
        read_header(file)
