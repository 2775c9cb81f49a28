"""Training on preference pairs: what DPO, KTO and the like share.

The reference is the model before the training: the base model without the new adapter, or the same base model with a
frozen copy of the adapter that training goes on with. There is no second model in memory.

Held-out pairs are measured one by one, in the same way for every loss. With log-probabilities of whole answers, the
reward of an answer is `beta * (log p(answer) - log p_reference(answer))` (Rafailov et al., 2023, arXiv:2305.18290).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from pipeline.config.schema import TrainingRun
from pipeline.data.encode import Encoded, EncodedSet
from pipeline.models.checkpoint_files import ADAPTER_FILES
from pipeline.training.adapter_files import ADAPTER
from pipeline.training.checkpoints import SafeCheckpoints
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
    from transformers import PreTrainedTokenizerBase

REFERENCE = "ref"  # trl's name of the frozen copy of an adapter


def build(
    kind: Callable[..., PreferenceTrainer],
    arguments: Callable[..., Any],
    rows: Callable[[Sequence[Encoded]], list[dict[str, Any]]],
    config: TrainingRun,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, EncodedSet],
    job: Job,
    **fixed: Any,
) -> PreferenceTrainer:
    """Return a training loop on preference pairs.

    Args:
        kind: the class of the loop.
        arguments: trl's class of its settings.
        rows: makes the rows that trl's loop takes of preference pairs.
        config, model, tokenizer, data, job: as for `pipeline.training.trainers.Trainer.build`.
        fixed: arguments of the loop that this kind of training sets itself.

    Raises:
        UserError: if the settings cannot work.
    """
    settings = config.train
    held_out = data["held-out"].examples
    args = arguments(**common_arguments(config, job, measures=bool(held_out)) | fixed, **settings.options)
    base: Any = load_for_training(config, model)
    if job.start:
        base = PeftModel.from_pretrained(base, str(job.start), is_trainable=True)
    with naming_refused_settings(settings):
        trainer = kind(
            model=base,
            args=args,
            train_dataset=Dataset.from_list(rows(data["training"].examples)),
            eval_dataset=Dataset.from_list(rows(held_out)) if held_out else None,
            processing_class=tokenizer,
            peft_config=None if job.start else lora_config(settings.lora),
            callbacks=common_callbacks(settings, False, data, job),
        )
    adapted = cast(PeftModel, trainer.model)
    if job.start:
        _restore(adapted, job.start)
    prepare_adapted(adapted, config, model, mean_logits=True)
    trainer.held_out, trainer.progress = held_out, job.progress
    return trainer


def _restore(model: PeftModel, start: Path) -> None:
    """Give the trained adapter and its frozen copy the stored float32 values, which peft and trl have rounded."""
    stored = load_file(start / ADAPTER_FILES[1])
    adapters = [name for name in (ADAPTER, REFERENCE) if name in model.peft_config]
    for name, parameter in model.named_parameters():
        if any(f".{adapter}." in name for adapter in adapters):
            parameter.data = parameter.data.float()
    for adapter in adapters:
        set_peft_model_state_dict(model, stored, adapter)


class PreferenceTrainer(SafeCheckpoints, Trainer):
    """A trl trainer of preference pairs as `pipeline.data` makes them; mix it with a trainer of trl.

    Attributes:
        held_out: the pairs that are measured.
        progress: called with how much is done, of how much, and what.
    """

    held_out: Sequence[Encoded] = ()
    progress: Callable[[int, int, str], None] = staticmethod(lambda done, total, what: None)

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any, **settings: Any) -> Dataset:
        return dataset  # it has tokens already

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **settings: Any) -> EvalLoopOutput:
        """Measure the held-out pairs. The loss is that of DPO, whatever the loss of training is."""
        figures = {f"{metric_key_prefix}_{name}": value for name, value in self._measure().items()}
        return EvalLoopOutput(cast(Any, None), None, figures, len(self.held_out))

    def _measure(self) -> dict[str, float]:
        beta, model = float(cast(Any, self.args).beta), cast(PeftModel, self.model)
        size, pad = self.args.per_device_eval_batch_size, cast(int, self.processing_class.pad_token_id)  # type: ignore[union-attr]
        margins, likelier, likelier_before = [], [], []
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(self.held_out), size):
                pairs = self.held_out[start : start + size]
                sides = [list(pairs), [cast(Encoded, pair.rejected) for pair in pairs]]  # better and worse answers
                after = [answer_log_probs(model, side, pad) for side in sides]
                with reference(model):
                    before = [answer_log_probs(model, side, pad) for side in sides]
                lengths = [torch.tensor([len(s.input_ids) - s.prompt_length for s in side]) for side in sides]
                margins += (beta * ((after[0] - before[0]) - (after[1] - before[1]))).tolist()
                likelier += (after[0] / lengths[0] > after[1] / lengths[1]).tolist()
                likelier_before += (before[0] / lengths[0] > before[1] / lengths[1]).tolist()
                self.progress(start + len(pairs), len(self.held_out), "held-out pairs")
        finally:
            model.train(was_training)
        return preference_figures(margins, likelier, likelier_before)


def answer_log_probs(model: PeftModel, sequences: Sequence[Encoded], pad: int) -> torch.Tensor:
    """Return the log-probability of the answer in each sequence, (number of sequences,) in float32 on the CPU.

    Args:
        pad: the token that fills short sequences.
    """
    longest = max(len(sequence.input_ids) for sequence in sequences)

    def filled(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    device = next(model.parameters()).device
    ids = torch.tensor([filled(s.input_ids, pad) for s in sequences], device=device)
    labels = torch.tensor([filled(s.labels, -100) for s in sequences], device=device)
    mask = torch.tensor([filled([1] * len(s.input_ids), 0) for s in sequences], device=device)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
    return found.log_probs.float().sum(1).cpu()


@contextmanager
def reference(model: PeftModel) -> Iterator[None]:
    """Make the model the one before the training."""
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.set_adapter(REFERENCE)
    try:
        yield
    finally:
        model.set_adapter(ADAPTER)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def preference_figures(
    margins: Sequence[float], likelier: Sequence[bool], likelier_before: Sequence[bool]
) -> dict[str, float]:
    """Return the figures of measured pairs, with their standard errors.

    Args:
        margins: the reward of each better answer minus that of the worse one.
        likelier: True for pairs whose better answer has the higher log-probability per token.
        likelier_before: the same for the model before the training.

    Returns:
        `loss` of DPO in nats; `preference_accuracy`, the share of positive margins (0.5 before the training, by
        chance); `reward_margin`; `likelier`, the share of pairs whose better answer is likelier; and `likelier_gain`,
        its change by the training.
    """
    values = torch.tensor(margins, dtype=torch.float64)
    right = (values > 0).double()
    after, before = (torch.tensor(part, dtype=torch.float64) for part in (likelier, likelier_before))
    figures = {"loss": float(-logsigmoid(values).mean())}
    shares = {
        "preference_accuracy": right,
        "reward_margin": values,
        "likelier": after,
        "likelier_gain": after - before,
    }
    for name, each in shares.items():
        figures[name] = float(each.mean())
        figures[f"{name}_stderr"] = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.inf
    return {name: value for name, value in figures.items() if math.isfinite(value)}
