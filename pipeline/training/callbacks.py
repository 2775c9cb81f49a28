"""Callbacks of a training loop: its progress and figures, and checkpoints that survive a power cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from pipeline.system.files import sync_all, write_text
from pipeline.training.checkpoints import ON_DISK


class OnDisk(TrainerCallback):
    """Writes each checkpoint through to the disk before the next step, and then marks it.

    Otherwise the files of a checkpoint may be there without content after a power cut.
    """

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync_all(checkpoint)
            write_text(checkpoint / ON_DISK, "")


class Reports(TrainerCallback):
    """Passes on the progress and the figures of a training loop."""

    def __init__(self, progress: Callable, metrics: Callable):
        self._progress, self._metrics, self._batches = progress, metrics, 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._batches += 1
        self._progress(self._batches, len(eval_dataloader), "held-out loss")

    def on_evaluate(self, args, state, control, **kwargs):
        self._batches = 0

    def on_step_end(self, args, state, control, **kwargs):
        loss = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
        shown = f", loss {loss:.3f}" if loss is not None else ""
        self._progress(state.global_step, state.max_steps, f"step {state.global_step}/{state.max_steps}{shown}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        values = {}
        for key, value in (logs or {}).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                # `loss` is a step's, `train_loss` the mean at the end: not a point of the same curve.
                split, _, name = key.partition("_") if key.startswith("eval_") else ("train", "", key)
                values[f"{split}/{'mean_loss' if name == 'train_loss' else name.removeprefix('train_')}"] = value
        if values:
            self._metrics(values, state.global_step)
