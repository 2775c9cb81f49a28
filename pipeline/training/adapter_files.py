"""The files of a trained adapter, as plain LoRA on the unchanged base model.

Some ways to begin (PiSSA, OLoRA) take a part out of the base's weights, put it into the first factors, and train on the
rest. Their adapter is written as the difference from its first factors, with twice the rank, so that it fits the base.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Lora
from pipeline.config.training_options import CONVERTED_BEGINNINGS

if TYPE_CHECKING:
    from peft import PeftModel

BEGINNING = "beginning"  # folder of the first factors, beside the checkpoints
ADAPTER = "default"  # peft's name of the trained adapter


def is_converted(lora: Lora) -> bool:
    """Return True if training begins in a way that changes the base."""
    return lora.options.get("init_lora_weights") in CONVERTED_BEGINNINGS


def keep_beginning(model: PeftModel, lora: Lora, checkpoints: Path) -> None:
    """Write the first factors of an untrained adapter, if they are needed to convert it later."""
    if not is_converted(lora):
        return
    folder = checkpoints / BEGINNING
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER])


def save_adapter(
    model: PeftModel, folder: Path, lora: Lora, checkpoints: Path, weights: dict[str, Any] | None = None
) -> None:
    """Write the adapter to a folder.

    Args:
        lora: the settings of the adapter.
        checkpoints: folder of the checkpoints; see `keep_beginning`.
        weights: its weights, if the model is sharded.

    Raises:
        ValueError: if peft cannot convert it.
    """
    beginning = str(checkpoints / BEGINNING) if is_converted(lora) else None
    sharded: dict[str, Any] = {} if weights is None else {"state_dict": weights}
    model.save_pretrained(
        str(folder), selected_adapters=[ADAPTER], path_initial_model_for_weight_conversion=beginning, **sharded
    )
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours covers the adapter
