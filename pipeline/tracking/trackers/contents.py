"""The contents of a run that all trackers show: texts of events, figures of all models, settings."""

from __future__ import annotations

import json
from typing import Any

from pipeline.config.schema import Config
from pipeline.evaluation.model_result import TEXTS
from pipeline.evaluation.overview import NAMES
from pipeline.tracking.events import alert_level

_FIGURES = {"perplexity": "perplexity", "rise": "rise of perplexity", "kl": "KL divergence", "agreement": "same token"}
_COLUMNS = {
    "model": "model",
    "size_bytes": "weights, MB",
    **{f"{text}_{key}": f"{name}, {on} text" for text, on in TEXTS.items() for key, name in _FIGURES.items()},
    "tokens_per_second": "tokens per second",
    "peak_memory_bytes": "peak memory, MB",
    "passed": "within its limits",
}


def as_text(record: dict) -> str:
    """Return the text of an event's alert: a sentence for people, and a line of JSON for programs."""
    outcome = {
        "started": "started",
        "completed": f"finished after {record.get('seconds', 0):,.1f} seconds",
        "pushed": f"sent to {record.get('url') or record.get('repo')}",
        "failed": record["message"]
        if alert_level(record) == "warn"
        else f"{record.get('error')}: {record.get('message')}",
    }[record["event"].rpartition("_")[2]]
    subject = ", ".join([f"run {record['run']}", *([f"variant {record['variant']}"] if "variant" in record else [])])
    return f"{subject}: {record['stage']} {outcome}\n{json.dumps(record, separators=(',', ':'))}"


def event_values(record: dict) -> tuple[str, dict[str, Any]]:
    """Return the name of an event's values, such as `quantization/int8/completed`, and the values."""
    prefix = "/".join(filter(None, (record["stage"], record.get("variant"))))
    values = {key: value for key, value in record.items() if key not in ("time", "run", "event")}
    return f"{prefix}/{record['event'].rpartition('_')[2]}", values


def models_table(rows: list[dict]) -> tuple[list[str], list[list[Any]]]:
    """Return the figures of all models as the names of columns and the cells: one row for each model."""
    known = [key for key in _COLUMNS if any(key in row for row in rows)]
    return [_COLUMNS[key] for key in known], [[_cell(key, row.get(key)) for key in known] for row in rows]


def _cell(key: str, value: Any) -> Any:
    if key == "model":
        return NAMES.get(value, value)
    if key == "passed":
        return {True: "yes", False: "no"}.get(value)
    return None if value is None else float(f"{value / 1e6 if key.endswith('_bytes') else value:.5g}")


def run_settings(config: Config) -> dict[str, str]:
    """Return the settings of a run that a list of runs shows."""
    settings = {"model": config.model.source, "adapter": config.merge.adapter}
    if config.data:
        settings |= {"data": config.data.named, "method": config.train.method}
    return {key: value for key, value in settings.items() if value}
