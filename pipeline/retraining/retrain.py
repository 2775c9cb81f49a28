"""Train again, and publish only what is better than the model that the repository has.

Both models are measured in this run, on held-out examples whose prompts neither was trained on, and compared token
by token; the new one is better where its loss is lower by more than `margin` standard errors of the difference, or
where these are of few prompts, by as many more as make it no likelier that chance decides.
Nothing is published before that is decided, and then everything in one commit.

What was decided is kept beside the run's folder, so that asking again with the same inputs trains nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import GateError, StageFailed
from pipeline.evaluation.results import Comparison
from pipeline.evaluation.student_t import MARGIN
from pipeline.publishing.published_model import PublishedModel, read_published, with_full_model
from pipeline.retraining.decision import Decision, Matter, Outcome, better, check, look, tell
from pipeline.retraining.lock import alone, refuse_beside_job
from pipeline.tracking.events import Events
from pipeline.workflow.baseline import forget, note, own_weights
from pipeline.workflow.preflight import preflight
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.runner import Runner
from pipeline.workflow.stages.compare_published import RESULT
from pipeline.workflow.workspace import Workspace

ROUNDS = 3  # how often others may publish while this run compares


def retrain(
    config: Config,
    root: str | Path = "runs",
    *,
    margin: float = MARGIN,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Decision:
    """Retrain a published model.

    Args:
        root: folder under which the run's folder lies.
        margin: standard errors of the difference by which the new model's loss has to be lower, 0 to 10.
        force: train anew where nothing has changed, or where it was decided before; all else in the run's folder stays.

    Raises:
        Busy: where another retraining of the repository is under way on this machine, or as a Job of this user.
        UserError: as `pipeline.workflow.run` does; the repository is then as it was.
    """
    config = check(config, margin)
    with alone(config.publish.target):
        preflight(config)
        refuse_beside_job(config.publish.target)
        matter = look(config, root)
        if not force and (settled := matter.settled(margin)):
            return settled
        inputs = matter.inputs
        anew = force and matter.record.state not in ("running", "better")  # one that was stopped goes on
        with (
            Workspace.claim(matter.folder, inputs.config) as workspace,
            Runner(inputs.config, workspace, reporter or Reporter()) as runner,
        ):
            if anew:
                workspace.undo("train")
                shutil.rmtree(workspace.checkpoints, ignore_errors=True)
            return _Retraining(matter, margin).decide(workspace, runner)


@dataclass(frozen=True)
class _Retraining:
    """One retraining, under way."""

    matter: Matter
    margin: float

    def decide(self, workspace: Workspace, runner: Runner) -> Decision:
        """Train, compare, and publish what is better; compare again where others have published meanwhile."""
        inputs, live, record, path = self.matter.inputs, self.matter.live, self.matter.record, self.matter.path
        # The commit is there already where only what comes after it was cut short.
        is_there = live is not None and record.state == "better" and live.weights == own_weights(workspace)
        for attempt in range(ROUNDS):
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
                _tell(workspace, comparison, is_better)
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
                is_ours = now and now.weights == own_weights(workspace)  # it is only tagging that failed
                if attempt == ROUNDS - 1 or is_ours or (now and now.model) == (live and live.model):
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
    """Every variant that is asked for, made and measured, but for those that missed their gate.

    Raises:
        StageFailed: where one fails: what is live has it perhaps, and would lose it.
        GateError: where one missed its gate that what is live has.
    """
    variants = tuple(spec.name for spec in config.quantize.variants)
    runner.write_variants(variants)
    for variant in variants:
        runner.measure_variant(variant)
    runner.raise_failures(withheld=False)
    for variant, line in runner.withheld().items():
        if live and variant in live.results.variants:
            raise GateError(
                f"{line}; {live.repo} has {variant}, and would lose it: nothing is published; "
                "set another limit (quantize.gate), or leave that variant out"
            )
    return runner.released(variants)


def _tell(workspace: Workspace, comparison: Comparison, is_better: bool) -> None:
    """The decision as metrics beside the training's own."""
    gap = comparison.difference
    figures = {"new": comparison.new.value, "live": comparison.live.value, "difference": gap.value}
    figures |= {"stderr": gap.stderr, "decided": float(is_better)}
    step = workspace.read_measurement("training").get("steps", 0)
    name = workspace.config().name
    Events(workspace.events_path, name).metrics({f"retraining/{key}": value for key, value in figures.items()}, step)
