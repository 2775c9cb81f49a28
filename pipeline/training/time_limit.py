"""Training within a time limit: as many steps as fit, with a schedule that ends with the last step.

The first steps show how long a step takes. The plan is recorded with the used time, so that a resumed training
follows the same plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from pipeline.errors import UserError

WARM_UP_STEPS, TIMED_STEPS = 1, 2  # the first step also fills caches, so it takes longer than others
FORWARD_SHARE = 0.5  # longest time of a forward pass, as a share of the time of a training step on the same tokens

Value = TypeVar("Value")


class TimeLimit(TrainerCallback):
    """Plan the steps that fit into some minutes, and stop at the end of a step if they took longer than planned.

    Args:
        minutes: the limit, from the first step on; evaluations are planned in.
        evaluation_steps: tokens that each evaluation reads, divided by the tokens of a training step.
        known: the last recorded plan, if this training was stopped.
        keep: records a plan: the number of `steps`, and the used `seconds`.
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the recorded plan, if there is one."""
        kept = _broadcast(args, self._known)
        self._start = time.monotonic() - kept.get("seconds", 0.0)
        self._first_step = state.global_step
        if (steps := kept.get("steps")) is not None:
            self._follow(int(steps), args, state, kwargs["lr_scheduler"])
        if _broadcast(args, self._used() >= self._limit):
            state.max_steps = min(state.max_steps, state.global_step) or 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Plan the steps after the timed ones, and stop at the end of the plan or of the time."""
        done = state.global_step - self._first_step
        if done == WARM_UP_STEPS:
            self._timed_from = time.monotonic()
        if self._planned is None and done == WARM_UP_STEPS + TIMED_STEPS:
            seconds = (time.monotonic() - self._timed_from) / TIMED_STEPS
            steps = min(state.max_steps, state.global_step + self._more_steps(seconds, args))
            self._follow(_broadcast(args, steps), args, state, kwargs["lr_scheduler"])
            self._keep(state)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
        elif _broadcast(args, self._used() >= self._limit):
            control.should_training_stop = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the plan beside the checkpoint."""
        self._keep(state)

    def _used(self) -> float:
        return time.monotonic() - self._start

    def _more_steps(self, seconds: float, args: TrainingArguments) -> int:
        """Return how many more steps of `seconds` each fit, together with their evaluations."""
        evaluation = FORWARD_SHARE * self._evaluation_steps * seconds
        left = self._limit - self._used() - evaluation
        return max(0, int(left / (seconds + evaluation / (args.eval_steps or math.inf))))

    def _follow(self, steps: int, args: TrainingArguments, state: TrainerState, lr_scheduler: Any) -> None:
        """Let training end after `steps` steps, and its learning rates with it."""
        self._planned = steps
        if not hasattr(lr_scheduler, "lr_lambdas"):
            raise UserError(
                "train.max_minutes: a schedule in a DeepSpeed file cannot be planned. Try: remove it from the file"
            )
        state.max_steps = steps
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)  # only carries the curve of the rates
        planned = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
        rate = planned.lr_lambdas[0]
        lr_scheduler.lr_lambdas = [rate] * len(lr_scheduler.lr_lambdas)
        rates = [base * rate(lr_scheduler.last_epoch) for base in lr_scheduler.base_lrs]
        for group, value in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = value
        lr_scheduler._last_lr = rates  # torch has no public name for it

    def _keep(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            plan = {} if self._planned is None else {"steps": self._planned}
            self._record({**plan, "seconds": round(self._used(), 1)})


def _broadcast(args: TrainingArguments, value: Value) -> Value:
    """Return the value of the main process, in every process."""
    if args.world_size == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
