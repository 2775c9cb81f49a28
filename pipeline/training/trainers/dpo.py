"""Direct preference optimization with trl (Rafailov et al., 2023, arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DPOConfig, DPOTrainer

from pipeline.config.schema import TrainingRun
from pipeline.data.encode import Encoded, EncodedSet
from pipeline.training.trainers import Job, preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DpoTrainer(preference.PreferenceTrainer, DPOTrainer):
    """trl's training loop of DPO, on tokens."""


def build(
    config: TrainingRun, model: Path, tokenizer: PreTrainedTokenizerBase, data: dict[str, EncodedSet], job: Job
) -> preference.PreferenceTrainer:
    """Return the training loop of an adapter on preference pairs."""
    return preference.build(DpoTrainer, DPOConfig, _rows, config, model, tokenizer, data, job)


def _rows(pairs: Sequence[Encoded]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": pair.input_ids[: pair.prompt_length],
            "chosen_ids": pair.input_ids[pair.prompt_length :],
            "rejected_ids": pair.rejected.input_ids[pair.prompt_length :],
        }
        for pair in pairs
        if pair.rejected
    ]
