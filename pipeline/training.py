"""trl's trainer, made to do in several processes what it does in one.

Each process takes every n-th batch, so a step sees the same examples in any number of processes. Where
the last step of an epoch does not go round, accelerate would repeat examples; here the rest is filled
with blanks, which have nothing that counts. The held-out loss is that of a counted token, over all
of them: it depends on no division into batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from trl import SFTTrainer

from pipeline.data.encode import NO_LOSS


class Trainer(SFTTrainer):
    """Takes token ids and labels, as `pipeline.data` makes them."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self._examples, self._blanks, processes = len(self.train_dataset), 0, self.accelerator.num_processes
        if processes == 1:
            return
        self._blanks = -self._examples % (self.args.per_device_train_batch_size * processes)
        self.train_dataset = _with_blanks(self.train_dataset, min(self._blanks, 1))
        if self.eval_dataset is not None:
            together = self.args.per_device_eval_batch_size * processes
            self.eval_dataset = _with_blanks(self.eval_dataset, -len(self.eval_dataset) % together)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        if not self._blanks:
            return super()._get_train_sampler(train_dataset)
        # The order that accelerate gives an ordinary sampler, and after it the blank, which lies at the end.
        order = SeedableRandomSampler(range(self._examples), data_seed=self.args.data_seed)
        return _Filled(order, [self._examples] * self._blanks)

    def evaluation_loop(self, *arguments, **settings):
        self._loss_of_all, self._counted = 0.0, 0
        output = super().evaluation_loop(*arguments, **settings)
        prefix = settings.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = float(self._loss_of_all / self._counted)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            counted = self._get_num_items_in_batch([inputs], self.args.device)  # in all processes
            # As in training, the mean over processes is the loss of a token.
            loss = self.compute_loss(model, inputs, num_items_in_batch=counted).detach()
        self._loss_of_all += float(self.accelerator.reduce(loss.clone(), "mean") * counted)
        self._counted += int(counted)
        return loss, None, None


class _Filled(Sampler):
    """Another sampler's order, and then some more."""

    def __init__(self, sampler: SeedableRandomSampler, more: list[int]):
        self._sampler, self._more = sampler, more

    def __len__(self) -> int:
        return len(self._sampler) + len(self._more)

    def __iter__(self) -> Iterator[int]:
        yield from self._sampler
        yield from self._more

    def set_epoch(self, epoch: int) -> None:
        self._sampler.set_epoch(epoch)


def _with_blanks(dataset, count: int):
    """A data set with so many examples at its end in which no token counts."""
    from datasets import Dataset, concatenate_datasets

    if not count:
        return dataset
    token = dataset[0]["input_ids"][0]
    blank = {"input_ids": [token, token], "labels": [NO_LOSS, NO_LOSS], "seq_lengths": [2]}
    columns = {name: [blank[name]] * count for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])


def divided() -> str | None:
    """What divides the model, its gradients or its optimizer among the processes, if anything does."""
    from accelerate.utils import parse_flag_from_env

    kinds = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((kind for kind, variable in kinds.items() if parse_flag_from_env(variable)), None)


def whole_adapter(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The trained weights by name, put together where each process holds a part; every process must ask.

    None where they lie whole in the model.
    """
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    if divided() == "fsdp":
        return {name: p.full_tensor().detach().cpu() for name, p in trained.items()}
    if divided() == "deepspeed":
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}
    return None
