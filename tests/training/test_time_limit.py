"""Training within a time limit: the plan, its schedule, and resuming."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from pipeline.config.schema import Config
from pipeline.data.encode import Encoded, EncodedSet
from pipeline.training.time_limit import TimeLimit
from pipeline.training.trainers import Job
from pipeline.training.trainers.sft import build


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("pipeline.training.time_limit.time.monotonic", lambda: self.now)


class Loop:
    """What transformers' loop does with a callback, at a pace that the test sets."""

    def __init__(self, folder, limit: TimeLimit, steps: int, done: int = 0, **settings):
        self.args = TrainingArguments(
            str(folder), learning_rate=1.0, warmup_steps=0.1, eval_strategy="steps", lr_scheduler_type="linear",
            use_cpu=True, **{"eval_steps": 1000, **settings},
        )  # fmt: skip
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self.schedule = get_scheduler("linear", self.optimizer, self.args.get_warmup_steps(steps), steps)
        self.limit, self.state, self.control = limit, TrainerState(max_steps=steps), TrainerControl()
        for _ in range(done):
            self._step()
        limit.on_train_begin(self.args, self.state, self.control, lr_scheduler=self.schedule)

    def _step(self):
        self.optimizer.step()
        self.schedule.step()
        self.state.global_step += 1

    def run(self, clock: Clock, seconds) -> list[float]:
        """Steps until the end, each so many seconds long; the learning rate after each."""
        rates = []
        while not self.control.should_training_stop:
            clock.now += next(seconds)
            self._step()
            self.limit.on_step_end(self.args, self.state, self.control, lr_scheduler=self.schedule)
            rates.append(self.optimizer.param_groups[0]["lr"])
            assert len(rates) < 10_000
        return rates


def every(seconds: float):
    while True:
        yield seconds


def test_as_many_steps_are_planned_as_fit_and_the_schedule_ends_with_them(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    plans = []
    loop = Loop(tmp_path, TimeLimit(minutes=10, evaluation_steps=0, keep=plans.append), steps=5000)
    rates = loop.run(clock, every(6.0))
    assert loop.state.global_step == loop.state.max_steps == 100
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert max(rates) == rates[9] == 1.0  # a tenth of the planned steps warms up
    assert [plan["steps"] for plan in plans] == [100]


@pytest.mark.parametrize(
    ("asked", "seconds", "done", "planned"),
    [
        (5000, [60.0, *[6.0] * 1000], 91, 91),  # the first step does not count for the plan
        (30, [6.0] * 1000, 30, 30),  # all steps fit
        (5000, [6.0] * 3 + [60.0] * 1000, 13, 100),  # steps take longer than planned
    ],
)
def test_training_ends_at_the_plan_or_at_the_limit(monkeypatch, tmp_path, asked, seconds, done, planned):
    clock = Clock(monkeypatch)
    loop = Loop(tmp_path, TimeLimit(minutes=10, evaluation_steps=0), steps=asked)
    loop.run(clock, iter(seconds))
    assert (loop.state.global_step, loop.state.max_steps) == (done, planned)


def test_time_is_left_for_evaluations(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    loop = Loop(tmp_path, TimeLimit(minutes=10, evaluation_steps=20), steps=5000, eval_steps=20)
    loop.run(clock, every(6.0))
    evaluations = 1 + loop.state.global_step // 20
    assert 540 < loop.state.global_step * 6 + evaluations * 60 <= 620


def test_training_that_goes_on_after_its_time_takes_no_step_more(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    plans = []
    first = Loop(tmp_path, TimeLimit(minutes=1, evaluation_steps=0, keep=plans.append), steps=5000)
    first.run(clock, iter([6.0] * 3 + [600.0]))
    assert first.control.should_save and first.state.global_step == 4
    first.limit.on_save(first.args, first.state, first.control)
    again = Loop(tmp_path, TimeLimit(minutes=1, evaluation_steps=0, known=plans[-1]), steps=5000, done=4)
    assert again.state.max_steps == again.state.global_step == 4


def test_training_that_goes_on_keeps_the_plan_and_the_time_that_was_used(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    plans = []
    first = Loop(tmp_path, TimeLimit(minutes=10, evaluation_steps=0, keep=plans.append), steps=5000)
    for _ in range(40):
        clock.now += 6.0
        first._step()
        first.limit.on_step_end(first.args, first.state, first.control, lr_scheduler=first.schedule)
    first.limit.on_save(first.args, first.state, first.control)
    clock.now += 9999.0  # it lay there for a while
    again = Loop(tmp_path, TimeLimit(minutes=10, evaluation_steps=0, known=plans[-1]), steps=5000, done=40)
    assert again.state.max_steps == 100
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(first.optimizer.param_groups[0]["lr"])
    again.run(clock, every(12.0))
    assert again.state.global_step == 70  # 240 s were used, and 360 are 30 of these steps


def test_real_training_stops_in_time_and_reaches_the_end_of_its_schedule(tiny_model, tmp_path):
    folder = tiny_model("llama")
    draw, plans = random.Random(0), []
    ids = [[draw.randrange(250) for _ in range(40)] for _ in range(64)]
    part = EncodedSet([Encoded(i, [-100, *i[1:]]) for i in ids], 0, 0, 0, 0)
    config = Config.model_validate(
        {
            "name": "limited", "model": {"source": str(folder)}, "data": {"source": "unused"},
            "train": {"method": "lora", "batch_size": 2, "accumulate": 1, "max_length": 64, "packing": False,
                      "max_steps": 100_000, "max_minutes": 0.05},
        }
    )  # fmt: skip
    trainer = build(config, folder, AutoTokenizer.from_pretrained(folder), {"training": part, "held-out": part},
                    Job(tmp_path, keep_time_plan=plans.append))  # fmt: skip
    trainer.train()
    plan = plans[-1]
    assert 3 <= trainer.state.global_step <= plan["steps"] < 100_000
    if trainer.state.global_step == plan["steps"]:
        assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
