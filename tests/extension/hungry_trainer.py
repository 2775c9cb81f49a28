"""A trainer in one file: supervised fine-tuning on a machine whose memory is enough for one sequence."""

from __future__ import annotations

from pipeline.config.training_catalog import TRAINERS, Trainer

TRIED: list[tuple[int, int]] = []  # (sequences in a forward pass, forward passes of a step) of each attempt


def register() -> None:
    """Add the trainer `hungry`."""
    TRAINERS["hungry"] = Trainer(
        "hungry", __name__, forms=("prompt_completion", "messages", "text"), metric="eval_loss"
    )


def build(config, model, tokenizer, data, job):
    """Return the training loop of `sft`, which runs out of memory with two sequences at a time."""
    import torch

    from pipeline.training.trainers import sft

    trainer = sft.build(config, model, tokenizer, data, job)
    TRIED.append((config.train.batch_size, config.train.accumulate))

    class Hungry(type(trainer)):
        def training_step(self, *arguments, **settings):
            if config.train.batch_size > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(*arguments, **settings)

    trainer.__class__ = Hungry
    return trainer
