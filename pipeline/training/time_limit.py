"""Training within a limit of time: as many steps as fit, with a schedule that is planned for them.

The first steps show how long one takes. The plan is recorded with the time that is used, so that a training that
goes on keeps to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, get_scheduler

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

WARM_UP_STEPS, TIMED_STEPS = 1, 2  # the first step also fills caches, so its time says little
FORWARD_SHARE = 0.5  # of a step's time, that a forward pass over as many tokens takes at most


class TimeLimit(TrainerCallback):
    """Plan the steps that fit into some minutes, and stop at the end of a step if they took longer than planned.

    Args:
        minutes: from the first step on. The plan leaves time for the evaluations; a step that is late does not.
        evaluation_steps: tokens that each evaluation reads, in those of a training step.
        known: the last plan that `keep` was given, if this training was stopped.
        keep: records a plan: the number of `steps`, and the `seconds` that are used.
    """

    def __init__(
        self,
        minutes: float,
        evaluation_steps: float,
        known: Mapping[str, float] | None = None,
        keep: Callable[[dict[str, float]], None] = lambda plan: None,
    ):
        self._limit, self._evaluation_steps = 60 * minutes, evaluation_steps
        self._known, self._record = known or {}, keep
        self._planned: int | None = None
        self._start = self._timed_from = 0.0
        self._first_step = 0

    def on_train_begin(self, args, state: TrainerState, control, lr_scheduler=None, **_):
        kept = _told(args, self._known)
        self._start = time.monotonic() - kept.get("seconds", 0.0)
        self._first_step, self._planned = state.global_step, kept.get("steps")
        if self._planned is not None:
            self._follow(args, state, lr_scheduler)
        if _told(args, self._used() >= self._limit):
            state.max_steps = min(state.max_steps, state.global_step) or 1

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, lr_scheduler=None, **_):
        done = state.global_step - self._first_step
        if done == WARM_UP_STEPS:
            self._timed_from = time.monotonic()
        if self._planned is None and done == WARM_UP_STEPS + TIMED_STEPS:
            seconds = (time.monotonic() - self._timed_from) / TIMED_STEPS
            self._planned = _told(args, min(state.max_steps, state.global_step + self._more_steps(seconds, args)))
            self._follow(args, state, lr_scheduler)
            self._keep(state)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
        elif _told(args, self._used() >= self._limit):
            control.should_training_stop = control.should_save = True

    def on_save(self, args, state, control, **_):
        self._keep(state)

    def _used(self) -> float:
        return time.monotonic() - self._start

    def _more_steps(self, seconds: float, args: TrainingArguments) -> int:
        """Return how many more steps fit if each takes so many seconds, with the evaluations between and after them."""
        evaluation = FORWARD_SHARE * self._evaluation_steps * seconds
        left = self._limit - self._used() - evaluation
        return max(0, int(left / (seconds + evaluation / args.eval_steps)))

    def _follow(self, args, state: TrainerState, lr_scheduler) -> None:
        """Set the end of training and its learning rates to those of the plan."""
        if not hasattr(lr_scheduler, "lr_lambdas"):
            raise UserError("train.max_minutes: DeepSpeed's own schedule cannot be planned; take it out of its file")
        state.max_steps = self._planned
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # only to have the schedule's curve
        planned = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(self._planned), self._planned)
        rate = planned.lr_lambdas[0]
        lr_scheduler.lr_lambdas = [rate] * len(lr_scheduler.lr_lambdas)
        rates = [base * rate(lr_scheduler.last_epoch) for base in lr_scheduler.base_lrs]
        for group, value in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = value
        lr_scheduler._last_lr = rates  # it has no other name

    def _keep(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._record({"steps": self._planned, "seconds": round(self._used(), 1)})


def _told(args: TrainingArguments, value):
    """Return what the first process says, in every process."""
    if args.world_size == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
