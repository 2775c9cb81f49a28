"""Callbacks of a training loop: progress, figures, and checkpoints that survive a power cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.system.files import sync_all, write_text
from pipeline.training.checkpoints import ON_DISK


class SyncCheckpoints(TrainerCallback):
    """A callback that flushes each checkpoint to the disk before the next step, and then marks it as complete.

    Without it, files of a checkpoint may be empty after a power cut.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Flush and mark the checkpoint of this step."""
        if state.is_world_process_zero:
            checkpoint = Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}"
            sync_all(checkpoint)
            write_text(checkpoint / ON_DISK, "")


class ProgressReporter(TrainerCallback):
    """A callback that passes on the progress and the figures of a training loop.

    Args:
        progress: called with how much is done, of how much, and a line about it.
        metrics: called with figures by name, and their step.
    """

    def __init__(self, progress: Callable[[int, int, str], None], metrics: Callable[[dict[str, float], int], None]):
        self._progress, self._metrics, self._batches = progress, metrics, 0

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report one more evaluated batch."""
        self._batches += 1
        self._progress(self._batches, len(kwargs["eval_dataloader"]), "held-out loss")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start to count batches at zero."""
        self._batches = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report one more step, with the last loss."""
        loss = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
        shown = f", loss {loss:.3f}" if loss is not None else ""
        self._progress(state.global_step, state.max_steps, f"step {state.global_step}/{state.max_steps}{shown}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on the finite figures of the log, as `train/NAME` and `eval/NAME`."""
        if not state.is_world_process_zero:
            return
        values = {}
        for key, value in (kwargs["logs"] or {}).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                # `loss` belongs to one step; `train_loss` is the mean at the end, so it needs another name.
                split, _, name = key.partition("_") if key.startswith("eval_") else ("train", "", key)
                values[f"{split}/{'mean_loss' if name == 'train_loss' else name.removeprefix('train_')}"] = value
        if values:
            self._metrics(values, state.global_step)
