"""A trainer in one file: supervised fine-tuning with a figure of its own."""

from __future__ import annotations

from pipeline.config.training_catalog import TRAINERS, Trainer


def register() -> None:
    """Add the trainers `calm`, and `talk` for data of another form."""
    for name, form in (("calm", "prompt_completion"), ("talk", "messages")):
        TRAINERS[name] = Trainer(name, __name__, forms=(form,), metric="eval_calm", merge_bases=("bf16",))


def build(config, model, tokenizer, data, job):
    """Return the training loop of `sft`, which also logs `eval_calm`."""
    from pipeline.training.trainers import sft

    trainer = sft.build(config, model, tokenizer, data, job)

    class Calm(type(trainer)):
        def evaluation_loop(self, *arguments, **settings):
            output = super().evaluation_loop(*arguments, **settings)
            output.metrics["eval_calm"] = 0.25
            return output

    trainer.__class__ = Calm
    return trainer
