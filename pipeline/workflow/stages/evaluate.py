"""Measure the full-precision model, and the base it came from, on held-out and on general text."""

from __future__ import annotations

from pipeline.config.schema import MeasuredRun
from pipeline.system.libraries import versions
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome
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
    return {"general": config.evaluate.general, "max_tokens": config.evaluate.max_tokens}


def depends(config: MeasuredRun, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    return {
        "evaluate": without_limit(config.evaluate.model_dump()),
        "general": text_depends(config, workspace),
        "after": made_from(config, workspace),
        "versions": versions(*LIBRARIES),
    }


def run(config: MeasuredRun, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    from pipeline.evaluation.evaluate import evaluate

    full = full_model(config, workspace, events)
    models = {reference(config): full, "base": base_model(config, workspace, events)}
    outputs, summary = [workspace.measurements / "reference"], {}
    for label, folder in models.items():
        result = evaluate(
            label, folder, config, run_texts(workspace), events.progress, None if label == reference(config) else full
        )
        outputs.append(workspace.write_measurement(label, result.to_json()))
        if label == reference(config) and workspace.read_measurement("texts"):
            outputs.append(workspace.measurements / "texts.json")
        for text, figures in result.quality.items():
            summary[f"{label}_{text}_perplexity"] = figures.perplexity.value
        summary["compute_dtype"] = result.compute_dtype
    return Outcome(tuple(outputs), summary)
