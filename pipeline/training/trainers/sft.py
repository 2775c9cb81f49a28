"""Supervised fine-tuning with trl, with the same result in one process and in several.

Each process takes every n-th batch, so a step sees the same examples in any number of processes. accelerate would
repeat examples to complete the last step of an epoch. Here blank examples complete the step; no token of them counts.
The held-out loss is the mean over all counted tokens, so it does not depend on the batches.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from pipeline.config.schema import TrainingRun
from pipeline.data.encode import EncodedSet
from pipeline.training.architecture_checks import check_logits, packs_apart
from pipeline.training.checkpoints import SafeCheckpoints
from pipeline.training.distributed import sharding
from pipeline.training.even_batches import PaddedSampler, add_blank_examples
from pipeline.training.trainers import Job
from pipeline.training.trainers.setup import (
    common_arguments,
    common_callbacks,
    load_for_training,
    lora_config,
    naming_refused_settings,
    prepare_adapted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from transformers.trainer_utils import EvalLoopOutput

CHECKED_TOKENS = 16  # of the first example, to compare logits


def build(
    config: TrainingRun, model: Path, tokenizer: PreTrainedTokenizerBase, data: dict[str, EncodedSet], job: Job
) -> SftTrainer:
    """Return the training loop of the base model in folder `model`; what is trained is in float32.

    Args:
        config: the run; `config.train` has the settings.
        model: folder of the base model.
        tokenizer: the tokenizer that made the tokens.
        data: the tokens of the `training` and the `held-out` examples.
        job: the work of this process.

    Raises:
        UserError: if the model has none of the layers that are to be trained.
        ModelError: if its logits cannot be trained or measured.
    """
    settings = config.train
    datasets = {
        name: Dataset.from_dict(
            {"input_ids": [e.input_ids for e in part.examples], "labels": [e.labels for e in part.examples]}
        )
        for name, part in data.items()
        if part.examples
    }
    evaluation = datasets.get("held-out")
    args = SFTConfig(
        **common_arguments(config, job, measures=evaluation is not None),
        packing=settings.packing,
        eval_packing=False,
        **settings.options,
    )
    # After SFTConfig, which prepares DeepSpeed to shard the model while it loads.
    base = load_for_training(config, model)
    if settings.packing and not packs_apart(base):
        args.packing = False
        job.say(
            f"train.packing: off, since packed examples would see each other in a model of type "
            f"{base.config.model_type}; each example is a row of its own"
        )
    with naming_refused_settings(settings):
        trainer = SftTrainer(
            model=base,
            args=args,
            train_dataset=datasets["training"],
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=lora_config(settings.lora) if settings.adapts else None,
            callbacks=common_callbacks(settings, args.packing, data, job),
        )
    if settings.adapts:
        prepare_adapted(cast("PeftModel", trainer.model), config, model)
    if not sharding():  # a sharded model does not run before its training
        check_logits(base, data["training"].examples[0].input_ids[:CHECKED_TOKENS])
    return trainer


class SftTrainer(SafeCheckpoints, SFTTrainer):
    """A trl trainer of token ids and labels, as `pipeline.data` makes them."""

    train_dataset: Dataset
    eval_dataset: Dataset | None

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._examples, self._blanks, processes = len(self.train_dataset), 0, self.accelerator.num_processes
        if processes == 1:
            return
        self._blanks = -self._examples % (self.args.per_device_train_batch_size * processes)
        self.train_dataset = add_blank_examples(self.train_dataset, min(self._blanks, 1))
        if self.eval_dataset is not None:
            together = self.args.per_device_eval_batch_size * processes
            self.eval_dataset = add_blank_examples(self.eval_dataset, -len(self.eval_dataset) % together)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self._blanks:
            return super()._get_train_sampler(train_dataset)
        # accelerate's order of the examples, and then the blank example, which is the last of the data set.
        order = SeedableRandomSampler(range(self._examples), data_seed=self.args.data_seed)
        return PaddedSampler(order, [self._examples] * self._blanks)

    def evaluation_loop(self, *arguments: Any, **settings: Any) -> EvalLoopOutput:
        """Evaluate, and replace the loss by the mean over all counted tokens, in nats."""
        self._loss_of_all, self._counted = 0.0, 0
        output = super().evaluation_loop(*arguments, **settings)
        prefix = settings.get("metric_key_prefix", "eval")
        loss = float(self._loss_of_all / self._counted)
        return output._replace(metrics={**(output.metrics or {}), f"{prefix}_loss": loss})

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss of one batch, and count its tokens in all processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), self._plain_loss():
            counted = self._get_num_items_in_batch([inputs], self.args.device)  # in all processes
            assert counted is not None, "the batch has labels"
            # As in training, the mean over processes is the loss per token.
            loss = self.compute_loss(model, inputs, num_items_in_batch=counted).detach()
        self._loss_of_all += float(self.accelerator.reduce(loss.clone(), "mean") * counted)
        self._counted += int(counted)
        return loss, None, None

    @contextmanager
    def _plain_loss(self) -> Iterator[None]:
        """Measure the negative log-likelihood, even if training smooths labels or has another loss."""
        settings = cast(SFTConfig, self.args)
        kept = settings.loss_type, self.label_smoother
        settings.loss_type, self.label_smoother = "nll", None
        try:
            yield
        finally:
            settings.loss_type, self.label_smoother = kept
