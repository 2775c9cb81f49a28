"""Stage `evaluate`: the quality of the full-precision model and its base on held-out and general text."""

from __future__ import annotations

from pipeline.config.schema import MeasuredRun
from pipeline.evaluation.gates import ONE_CLUSTER
from pipeline.system.libraries import versions
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome, calibration_text
from pipeline.workflow.stages.inputs import (
    base_model,
    full_model,
    made_from,
    reference,
    run_texts,
    text_depends,
    without_limit,
)
from pipeline.workflow.workspace import Workspace

LIBRARIES = ("torch", "transformers")


def parameters(config: MeasuredRun, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {"general": config.evaluate.general, "max_tokens": config.evaluate.max_tokens}


def depends(config: MeasuredRun, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    return {
        "evaluate": without_limit(config.evaluate.model_dump()),
        "general": text_depends(config, workspace),
        "after": made_from(config, workspace),
        "versions": versions(*LIBRARIES),
    }


def run(config: MeasuredRun, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Measure the full-precision model and the base model."""
    from pipeline.evaluation.evaluate import evaluate

    full = full_model(config, workspace, events)
    if not config.data:  # the training has checked it
        calibration_text.check(config, workspace, full)
    models = {reference(config): full, "base": base_model(config, workspace, events)}
    outputs = [workspace.measurements / "reference"]
    summary: dict[str, object] = {}
    for label, folder in models.items():
        result = evaluate(
            label, folder, config, run_texts(workspace), events.progress, None if label == reference(config) else full
        )
        outputs.append(workspace.write_measurement(label, result.to_json()))
        if label == reference(config) and workspace.read_measurement("texts"):
            outputs.append(workspace.measurements / "texts.json")
        for text, figures in result.quality.items():
            if figures.clusters == 1 and label == reference(config):
                events.show([ONE_CLUSTER[text]])
            assert figures.perplexity, "every measured text has a perplexity"
            summary[f"{label}_{text}_perplexity"] = figures.perplexity.value
        summary["compute_dtype"] = result.compute_dtype
    return Outcome(tuple(outputs), summary)
