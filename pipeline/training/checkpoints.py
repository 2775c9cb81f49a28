"""Checkpoints of a training in safetensors and JSON, without pickles.

The exception is a sharded model: accelerate writes and reads its checkpoints.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer

from pipeline.errors import UserError
from pipeline.models.checkpoint import read_header
from pipeline.system.files import read_json, write_text
from pipeline.training.adapter_files import ADAPTER
from pipeline.training.distributed import sharding
from pipeline.training.resume_state import load_state, random_state, save_state, set_random_state

if TYPE_CHECKING:
    from trl import SFTTrainer

TRAINING_STATE = "training_state.safetensors"  # in a checkpoint: the optimizer and the schedule
TRAINER_STATE = "trainer_state.json"  # in a checkpoint: the state that transformers keeps, its last file
ON_DISK = "on-disk"  # the file in a checkpoint that is written after all others are on the disk


class SafeCheckpoints(Trainer):
    """A trainer that writes and reads checkpoints without pickles."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model, main = cast(PreTrainedModel, self.model), self.args.should_save
        folder, adapted = cast(str, output_dir), isinstance(model, PeftModel)
        only: dict[str, Any] = {"selected_adapters": [ADAPTER]} if adapted else {}  # not the reference of preferences
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=main, **only)

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        if self.state.global_step < self.state.max_steps and not self._stopped_early():
            super()._run_epoch(*arguments, **settings)
        else:  # transformers takes steps too many after it resumes from the checkpoint of the last step
            self.control.should_training_stop = True

    def _stopped_early(self) -> bool:
        found = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in found)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if sharding():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save and self.optimizer and self.lr_scheduler:
            state = {"optimizer": self.optimizer.state_dict(), "schedule": self.lr_scheduler.state_dict()}
            save_state(Path(output_dir) / TRAINING_STATE, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if sharding():
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None and self.optimizer and self.lr_scheduler:
            state = load_state(Path(checkpoint) / TRAINING_STATE)
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["schedule"])

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the main process may not have made it yet
        save_state(self._random_state_file(output_dir), random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._random_state_file(checkpoint).is_file():  # else fewer processes wrote it
            set_random_state(load_state(self._random_state_file(checkpoint)))

    def _random_state_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"random_state_{self.args.process_index}.safetensors"


def is_complete(checkpoint: Path) -> bool:
    """Return True if a checkpoint was written completely.

    After a kill, a full disk or a power cut, files may be missing or cut. Every file is checked by its kind, because
    the file `on-disk` of the main process says nothing about the files of other processes.
    """
    if not (checkpoint / ON_DISK).is_file():
        return False
    try:
        read_json(checkpoint / TRAINER_STATE, {})["global_step"]
        for path in (p for p in checkpoint.rglob("*") if p.is_file()):
            if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return False
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            if path.suffix == ".safetensors":
                read_header(path)
    except (KeyError, ValueError, UserError):
        return False
    return True


def find_best_checkpoint(checkpoint: Path) -> None:
    """Correct the path of the best checkpoint in the state of another one, if the runs folder was moved.

    Raises:
        UserError: if the best checkpoint is missing; transformers would go on, with another result.
    """
    path = checkpoint / TRAINER_STATE
    state = read_json(path, {})
    best = state.get("best_model_checkpoint")
    if best is None:
        return
    here = checkpoint.parent / Path(best).name
    if not here.is_dir():
        raise UserError(f"{here}: the best checkpoint of this training is missing. Try: remove {checkpoint.parent}")
    if str(here) != best:
        write_text(path, json.dumps(state | {"best_model_checkpoint": str(here)}, indent=2) + "\n")


def restore_token_count(trainer: SFTTrainer, checkpoint: Path) -> None:
    """Continue the count of tokens from a checkpoint, which trl would start at zero."""
    rows = read_json(checkpoint / TRAINER_STATE, {})["log_history"]
    seen = next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), 0)
    trainer._total_train_tokens = seen  # trl has no public name for it
