"""Blank examples that complete the last batches, so that every process takes the same number of batches."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from pipeline.data.encode import NO_LOSS


class PaddedSampler(Sampler):
    """A sampler with the order of another one, followed by more indices."""

    def __init__(self, sampler: SeedableRandomSampler, more: list[int]):
        self._sampler, self._more = sampler, more

    def __len__(self) -> int:
        return len(self._sampler) + len(self._more)

    def __iter__(self) -> Iterator[int]:
        yield from self._sampler
        yield from self._more

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._sampler.set_epoch(epoch)


def add_blank_examples(dataset: Dataset, count: int) -> Dataset:
    """Return a data set with `count` more examples at its end, in which no token counts."""
    if not count:
        return dataset
    token = dataset[0]["input_ids"][0]
    blank = {"input_ids": [token, token], "labels": [NO_LOSS, NO_LOSS], "seq_lengths": [2]}
    columns = {name: [blank[name]] * count for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])
