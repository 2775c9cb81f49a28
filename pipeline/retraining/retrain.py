"""Retraining: train again, and publish only a model that is better than the published one.

This run measures both models on held-out examples whose prompts are in neither model's training data, and compares
them token by token. The new model is better if its loss is lower by more than `margin` standard errors of the
difference. For few prompts, or a few long ones, the quantile of Student's t takes the place of `margin`.
Nothing is published before the decision, and then everything in one commit.

A record beside the run's folder keeps the decision, so that a call with the same inputs trains nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import GateError, StageFailed
from pipeline.evaluation.cluster_errors import MARGIN
from pipeline.evaluation.results import Comparison
from pipeline.publishing.published_model import PublishedModel, read_published, with_full_model
from pipeline.publishing.removal import NO_REMOVAL, Removal
from pipeline.retraining.decision import Decision, Matter, Outcome, better, check, look, tell
from pipeline.retraining.lock import alone, refuse_beside_job
from pipeline.tracking.events import Events
from pipeline.workflow.baseline import forget, note, own_weights
from pipeline.workflow.kept_variants import note_removal, with_kept_variants
from pipeline.workflow.preflight import preflight
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.runner import Runner
from pipeline.workflow.stages.compare_published import RESULT
from pipeline.workflow.workspace import Workspace

ATTEMPTS = 3  # to publish, if others publish while this run compares


def retrain(
    config: Config,
    root: str | Path = "runs",
    *,
    margin: float = MARGIN,
    force: bool = False,
    removal: Removal = NO_REMOVAL,
    reporter: Reporter | None = None,
) -> Decision:
    """Retrain a published model.

    Args:
        root: parent of the run's folder.
        margin: standard errors of the difference by which the new model's loss has to be lower, 0 to 10.
        removal: variants of earlier releases to remove; all others stay.
        force: train again even if nothing has changed, or the decision is known; other steps of the run stay.

    Raises:
        Busy: if another retraining of the repository is running on this machine, or as a Job of this user.
        UserError: as in `pipeline.workflow.run`; the repository is then unchanged.
    """
    reporter = reporter or Reporter()
    config, agreed = with_kept_variants(config, Workspace(Path(root) / config.name), removal, reporter.show)
    config = check(config, margin)
    with alone(config.publish.target):
        preflight(config, removal=agreed)
        refuse_beside_job(config.publish.target)
        matter = look(config, root)
        if not force and (settled := matter.settled(margin)):
            return settled
        inputs = matter.inputs
        starts_over = force and matter.record.state not in ("running", "better")  # a stopped retraining goes on
        with (
            Workspace.claim(matter.folder, inputs.config) as workspace,
            Runner(inputs.config, workspace, reporter) as runner,
        ):
            note_removal(workspace, agreed)
            if starts_over:
                workspace.undo("train")
                shutil.rmtree(workspace.checkpoints, ignore_errors=True)
            return _Retraining(matter, margin).decide(workspace, runner)


@dataclass(frozen=True)
class _Retraining:
    """A retraining in progress."""

    matter: Matter
    margin: float

    def decide(self, workspace: Workspace, runner: Runner) -> Decision:
        """Train, compare, and publish a better model; compare again if others have published in between."""
        inputs, live, record, path = self.matter.inputs, self.matter.live, self.matter.record, self.matter.path
        # The commit exists already if an earlier attempt was interrupted after it.
        is_there = live is not None and record.state == "better" and live.weights == own_weights(workspace)
        for attempt in range(ATTEMPTS):
            note(workspace, live, inputs.to_dict())
            if not is_there:
                record = replace(
                    record, live=live.model if live else None, state="running", comparison=None, url=None, job=None
                )
                record.write(path)
            for stage in ("train", "merge", *(() if is_there else ("compare_published",))):
                runner.do(stage)
            comparison = Comparison.model_validate(workspace.read_measurement(RESULT))
            if live and not is_there:
                is_better = better(comparison, self.margin)
                _send_metrics(workspace, comparison, is_better)
                if not is_better:
                    replace(record, state="not_better", comparison=comparison).write(path)
                    forget(workspace)
                    return self._decision("not_better", live, comparison)
            runner.do("evaluate")
            variants = _all_variants(inputs.config, runner, live)
            record = replace(record, state="better", comparison=comparison)
            record.write(path)
            try:
                runner.do("publish", variants, again=True)
                break
            except StageFailed:
                now = with_full_model(read_published(inputs.config.publish.target))
                is_ours = now and now.weights == own_weights(workspace)  # only tagging failed
                if attempt == ATTEMPTS - 1 or is_ours or (now and now.model) == (live and live.model):
                    raise
                live, is_there = now, False
        done = workspace.ledger()["publish"].summary
        replace(record, state="published", url=done["url"]).write(path)
        forget(workspace)
        decision = self._decision("published", live, comparison)
        reason = "; ".join([decision.reason, *map(str, runner.withheld().values())])
        return replace(decision, reason=reason, url=done["url"], commit=done["commit"])

    def _decision(self, outcome: Outcome, live: PublishedModel | None, comparison: Comparison) -> Decision:
        figures = comparison if comparison.difference else None
        reason = tell(figures, self.margin) if figures else "the first model of this repository"
        return Decision(outcome, self.matter.repo, reason, self.margin, self.matter.news, figures)


def _all_variants(config: Config, runner: Runner, live: PublishedModel | None) -> tuple[str, ...]:
    """Make and measure every variant, and return those that passed their gate.

    Raises:
        StageFailed: if a variant fails, because the published release may have it and would lose it.
        GateError: if a variant of the published release missed its gate.
    """
    variants = tuple(spec.name for spec in config.quantize.variants)
    runner.write_variants(variants)
    for variant in variants:
        runner.measure_variant(variant)
    runner.compare_models()
    runner.raise_failures(withheld=False)
    for variant, line in runner.withheld().items():
        if live and variant in live.results.variants:
            raise GateError(
                f"{line}; {live.repo} would lose {variant}, so nothing is published. "
                f"Try: another limit (quantize.gate), or --remove {variant}"
            )
    return runner.released(variants)


def _send_metrics(workspace: Workspace, comparison: Comparison, is_better: bool) -> None:
    """Send the decision as metrics, beside those of the training."""
    new, live, gap = comparison.new, comparison.live, comparison.difference
    assert new and live and gap, "two models were compared"
    figures = {"new": new.value, "live": live.value, "difference": gap.value}
    figures |= {"stderr": gap.stderr, "decided": float(is_better)}
    step = workspace.read_measurement("training").get("steps", 0)
    name = workspace.config().name
    Events(workspace.events_path, name).metrics({f"retraining/{key}": value for key, value in figures.items()}, step)
