"""The state of a run: which steps run now, which are left, and which lost their files."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.tracking.events import STAGES, read_events
from pipeline.workflow.ledger import Ledger
from pipeline.workflow.runner import stages_before_variants, stages_for_variants
from pipeline.workflow.workspace import Workspace


@dataclass(frozen=True)
class RunState:
    """The steps of a run by key, such as `train` or `quantize/int4`.

    Attributes:
        running: steps that a process is doing now, with the time of their start (seconds since the epoch).
        stopped: steps that were started, did not end, and that no process is doing.
        left: steps of the configuration that have never finished and are not running.
        changed: finished steps whose files changed, or are gone.
        removed: finished steps whose files are all gone, as they should be: variants that the configuration does not
            name, and what was needed only to make variants.
    """

    running: dict[str, float]
    stopped: tuple[str, ...]
    left: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


def run_state(workspace: Workspace) -> RunState:
    """Return the state of a run, without changing anything.

    Raises:
        UserError: if its configuration or its ledger cannot be read.
    """
    ledger, config = workspace.read_ledger(), workspace.config()
    begun = _begun(workspace) | _preparing(ledger, config)
    is_working = workspace.is_in_use()
    running = begun if is_working else {}
    done, expected = ledger.done(), _expected(config, ledger)
    left = tuple(key for key in expected if key not in done and key not in running)
    stopped = tuple(key for key in begun if not is_working)
    changed = _changed(workspace, ledger)
    removed = tuple(
        key
        for key in changed
        if (key.startswith("quantize/") or key in stages_for_variants(config))
        and key not in expected
        and not any((workspace.folder / path).exists() for path in done[key].outputs)
    )
    return RunState(running, stopped, left, tuple(key for key in changed if key not in removed), removed)


def _expected(config: Config, ledger: Ledger) -> list[str]:
    variants = [f"quantize/{spec.name}" for spec in config.quantize.variants]
    needing = stages_for_variants(config).items()
    preparing = [stage for stage, names in needing if any(f"quantize/{name}" not in ledger.done() for name in names)]
    last = "publish" if config.publish.repo else "render"
    return [*stages_before_variants(config), *preparing, *variants, last]


def _preparing(ledger: Ledger, config: Config) -> dict[str, float]:
    """Return the stages that prepare variants and did not end, with their start; they send no events."""
    entries = {stage: ledger.steps[stage] for stage in stages_for_variants(config) if stage in ledger.steps}
    started = {stage: entry.progress.get("started", 0.0) for stage, entry in entries.items()}
    return {stage: start for stage, start in started.items() if start > entries[stage].finished}


def _begun(workspace: Workspace) -> dict[str, float]:
    """Return the steps whose start event is not followed by an end, with the time of the event."""
    verbs = {stage: verb for verb, (stage, _) in STAGES.items()}
    begun: dict[str, float] = {}
    for record in read_events(workspace.events_path)[0]:
        stage, _, kind = record.get("event", "").rpartition("_")
        if stage not in verbs:
            continue
        key = "/".join(filter(None, (verbs[stage], record.get("variant"))))
        if kind == "started":
            begun[key] = record["time"]
        elif kind in ("completed", "failed"):
            begun.pop(key, None)
    return begun


def _changed(workspace: Workspace, ledger: Ledger) -> tuple[str, ...]:
    """Return the finished steps with a file that is not as the last step that wrote it left it.

    A card is written again for its repository, so several steps can know a file.
    """
    done = ledger.done()
    known: dict[str, list] = {}
    for entry in done.values():
        for path, digest in entry.outputs.items():
            known.setdefault(path, []).append(digest)
    lost = {path for path, digests in known.items() if not any(d.holds(workspace.folder / path) for d in digests)}
    return tuple(key for key, entry in done.items() if lost & entry.outputs.keys())
