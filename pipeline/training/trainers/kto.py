"""Kahneman-Tversky optimization with trl (Ethayarajh et al., 2024, arXiv:2402.01306), on the answers of pairs.

The better answers count as wanted and the worse ones as unwanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from pipeline.config.schema import TrainingRun
from pipeline.data.encode import Encoded, EncodedSet
from pipeline.training.trainers import Job, preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class KtoTrainer(preference.PreferenceTrainer, KTOTrainer):
    """trl's training loop of KTO, on tokens."""

    def _prepare_dataset(self, dataset: Dataset, tokenizer: Any, args: KTOConfig, name: str) -> Dataset:
        """Add the answer to another prompt of the batch, on which the distance to the reference is estimated.

        A batch with a single pair has no other prompt, so the two answers change places.
        """
        size, answers = args.per_device_train_batch_size, dataset["completion_ids"]
        others = []
        for start in range(0, len(answers), size):
            batch = answers[start : start + size]
            turn = 2 if len(batch) > 2 else 1
            others += [*batch[-turn:], *batch[:-turn]]
        return dataset.add_column("KL_completion_ids", others)


def build(
    config: TrainingRun, model: Path, tokenizer: PreTrainedTokenizerBase, data: dict[str, EncodedSet], job: Job
) -> preference.PreferenceTrainer:
    """Return the training loop of an adapter on the answers of preference pairs."""
    answers = 2 * config.train.batch_size
    return preference.build(
        KtoTrainer, KTOConfig, _rows, config, model, tokenizer, data, job, per_device_train_batch_size=answers
    )


def _rows(pairs: Sequence[Encoded]) -> list[dict[str, Any]]:
    """Return a row for each answer; a batch has better and worse ones."""
    rows = []
    for pair in pairs:
        prompt = pair.input_ids[: pair.prompt_length]
        for sequence in pair.sequences:
            answer = sequence.input_ids[pair.prompt_length :]
            rows.append({"prompt_ids": prompt, "completion_ids": answer, "label": sequence is pair})
    return rows
