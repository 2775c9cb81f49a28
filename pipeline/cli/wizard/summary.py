"""Summary of the planned run: its work, needs, uploads, and duration."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.cli.wizard.draft import Draft
from pipeline.config.schema import Config, TrainingRun
from pipeline.planning import Plan, make_plan
from pipeline.planning.memory import wanted
from pipeline.planning.report import tell_shortage, tell_system_prompt, tell_time
from pipeline.system.text_format import size
from pipeline.tracking.trackers import tracker


def show_summary(draft: Draft) -> Plan:
    """Print a summary of the configuration that was written."""
    config = draft.config()
    plan = make_plan(config, runs=draft.runs, read_rows=False)
    draft.tell("")
    for label, line in _lines(config, plan):
        draft.tell(f"{label:<9} {line}")
    draft.tell(f"{'File':<10}{draft.written}")
    return plan


def _lines(config: TrainingRun, plan: Plan) -> Iterator[tuple[str, str]]:
    yield "Model", f"{config.model.source}, {millions(plan.model.parameters)} million parameters"
    yield "Data", f"{config.data.named}{_rows(plan, config.data.limit)}"
    if said := tell_system_prompt(plan):
        yield "System", said
    train = config.train
    steps = "unknown number of steps" if plan.steps is None else f"{plan.steps} steps"
    sequences = f"{train.batch_size} x {train.accumulate} sequences of up to {train.max_length} tokens"
    yield "Training", f"{train.method}, {steps} of {sequences}"
    yield "Quantized", _variants(config)
    if config.quantize.calibrated:
        text = ", ".join(config.quantize.calibration.sources) or "training data and general text"
        yield "Quality", f"{config.quantize.quality}, on {text}"
    yield "Published", _published(plan)
    shown_by = tracker(config.track.tracker)
    yield shown_by.LABEL, shown_by.place(config.track)
    fetched = f", {size(plan.fetched_bytes)} to download" if plan.fetched_bytes else ""
    yield "Needs", f"{_memory(plan)}, {size(plan.disk_bytes)} of disk{fetched}"
    yield "Takes", tell_time(plan)
    for short in plan.shortages:
        yield "Too large", tell_shortage(short)
    for change in plan.changes:
        yield "", f"Try: --set {change.setting}: {change.why}"


def millions(count: int) -> str:
    """Return a count in millions, with one decimal if it is below ten millions."""
    return f"{count / 1e6:,.{0 if count >= 10**7 else 1}f}"


def _rows(plan: Plan, limit: int | None) -> str:
    if plan.data is None or plan.data.examples is None:
        return ""
    return f", {min(plan.data.examples, limit) if limit else plan.data.examples:,} examples ({plan.data.how})"


def _variants(config: Config) -> str:
    """Return the variants with their groups or targets, such as `int8, int4 in groups of 64`."""
    told = []
    for spec in config.quantize.variants:
        groups = f" in groups of {spec.group_size}" if spec.group_size and not spec.variant.is_one_file else ""
        aims = spec.target.asked.items() if spec.target else ()
        told.append(spec.name + (f" for {' '.join(f'{key} {value:g}' for key, value in aims)}" if aims else groups))
    return ", ".join(told) or "nothing"


def _published(plan: Plan) -> str:
    publish = plan.config.publish
    if publish.repo is None:
        return "nothing; everything stays on this machine"
    visible = "private" if publish.private else "public"
    return f"{publish.repo} ({visible} if new), {size(plan.uploaded_bytes)} to upload"


def _memory(plan: Plan) -> str:
    host = max((wanted(stage.host) for stage in plan.stages), default=0)
    gpu = max((wanted(stage.gpu) for stage in plan.stages), default=0)
    told = f"{size(host)} of memory"
    return f"{told}, {size(gpu)} of GPU memory" if gpu else told
