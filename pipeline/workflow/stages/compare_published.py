"""Stage `compare_published`: the losses of the new and the published model on the same held-out examples."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config, TrainingRun
from pipeline.evaluation.model_result import Estimate
from pipeline.evaluation.results import ComparedWith, Comparison
from pipeline.models.safe_loading import open_tokenizer
from pipeline.publishing.published_model import PublishedModel
from pipeline.system.libraries import versions
from pipeline.tracking.events import Events
from pipeline.workflow import baseline
from pipeline.workflow.stages import Outcome
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pipeline.data import Example
    from pipeline.data.encode import Encoded
    from pipeline.evaluation.metrics import Scores

LIBRARIES = ("torch", "transformers")
RESULT = "retraining"  # the measurement, and the key in the results and the lineage


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {}


def depends(config: TrainingRun, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    compared, inputs = baseline.noted(workspace)
    return {
        "live": compared and compared.model,
        "inputs": inputs,
        "device": config.evaluate.device,
        "after": workspace.state_of("train", "merge"),
        "versions": versions(*LIBRARIES),
    }


def run(config: TrainingRun, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Compare with the published model, if there is one, and record the inputs of the new model."""
    compared, inputs = baseline.noted(workspace)
    made_of = Comparison(inputs=inputs, weights=baseline.own_weights(workspace))
    found = _compare(config, workspace, events, compared, made_of) if compared else made_of
    return Outcome((workspace.write_measurement(RESULT, found.to_json()),), {"compared": bool(compared)})


def _compare(
    config: TrainingRun, workspace: Workspace, events: Events, compared: PublishedModel, made_of: Comparison
) -> Comparison:
    """Return the loss of both models and the difference, paired by token, or by prompt if their tokens differ.

    The loss is in nats a token. Models with different tokens are compared in bits per byte of the target text.
    Answers to one prompt count as one unit, so the errors are those of a sample of prompts.
    """
    from pipeline.data import read_examples
    from pipeline.evaluation import metrics
    from pipeline.evaluation.eligible_prompts import unseen_examples
    from pipeline.inference.load import load

    fingerprint = workspace.read_measurement("data")["fingerprint"]
    held_out = read_examples(workspace.data / "held_out.jsonl")
    learned = config.train.loss_on
    examples, said = unseen_examples(held_out, fingerprint, compared.repo, compared.lineage, learned)
    sides: dict[str, tuple[str | Path, str | None]] = {
        "new": (workspace.release, None),
        "live": (compared.repo, compared.head),
    }
    tokenizers = {name: _tokenizer(*place) for name, place in sides.items()}
    chosen = _choose(config, examples, tokenizers)
    encoded, by_token = chosen.encoded, chosen.encoded["new"] == chosen.encoded["live"]
    scores: dict[str, Scores] = {}
    for name, (source, revision) in sides.items():
        tell = functools.partial(events.progress, what=f"measuring the {name} model")
        model, _ = load(source, revision=revision, device=config.evaluate.device, offload="auto")
        scores[name] = metrics.score(model, [s for e in encoded[name] for s in e], tell)
        device = str(metrics.device_of(model))
        del model
    if by_token:
        values = {name: s.nll for name, s in scores.items()}
        mean = functools.partial(metrics.mean, sequence=chosen.prompts_of(scores["new"], "new"))
    else:
        values = {name: chosen.bits(s, name) for name, s in scores.items()}
        mean = functools.partial(_per_byte, sizes=chosen.sizes)
    return Comparison(
        inputs=made_of.inputs,
        weights=made_of.weights,
        compared_with=ComparedWith(repo=compared.repo, commit=compared.head),
        unit="nats per token" if by_token else "bits per byte",
        paired_by="token" if by_token else "prompt",
        new=mean(values["new"]),
        live=mean(values["live"]),
        difference=mean(values["new"] - values["live"]),
        tokens=len(scores["new"].nll),
        examples=len(encoded["new"]),
        prompts=len(chosen.sizes),
        note=said,
        device=device,
    )


def _tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    from pipeline.inference.load import locate

    return open_tokenizer(locate(source, revision=revision))


@dataclass(frozen=True)
class _Chosen:
    """The examples that both models are scored on: E examples with P prompts.

    Attributes:
        encoded: the sequences of each example by model.
        prompt: (E,) int64, number of each example's prompt.
        sizes: (P,) float64, bytes of the target text of each prompt's examples.
    """

    encoded: dict[str, list[list[Encoded]]]
    prompt: torch.Tensor
    sizes: torch.Tensor

    def prompts_of(self, scores: Scores, name: str) -> torch.Tensor:
        """Return the prompt of each token, (T,): a text may be several sequences, a prompt may have several answers."""
        import torch

        example = torch.tensor([i for i, sequences in enumerate(self.encoded[name]) for _ in sequences])
        return self.prompt[example[scores.sequence]]

    def bits(self, scores: Scores, name: str) -> torch.Tensor:
        """Return the bits that a model needs for the examples of each prompt, (P,)."""
        import torch

        bits = torch.zeros_like(self.sizes)
        return bits.index_add_(0, self.prompts_of(scores, name), scores.nll.double() / math.log(2))


def _choose(
    config: TrainingRun, examples: tuple[Example, ...], tokenizers: dict[str, PreTrainedTokenizerBase]
) -> _Chosen:
    """Return the examples that fit both models, up to `evaluate.max_tokens` tokens of the new model.

    Raises:
        DataError: if there are too few prompts.
    """
    import torch

    from pipeline.data.encode import NO_LOSS
    from pipeline.evaluation.eligible_prompts import FEWEST, count_prompts, encode_untruncated, too_few_prompts

    encoded: dict[str, list[list[Encoded]]] = {name: [] for name in tokenizers}
    numbers: dict[str, int] = {}
    prompt, sizes, tokens = [], [], 0
    for example, both in encode_untruncated(config, examples, tokenizers):
        tokens += both["new"].tokens
        if len(numbers) >= FEWEST and tokens > config.evaluate.max_tokens:
            break
        for name, part in both.items():
            encoded[name].append(part.examples)
        counted = [label for sequence in both["new"].examples for label in sequence.labels if label != NO_LOSS]
        prompt.append(numbers.setdefault(example.prompt(config.train.loss_on), len(numbers)))
        sizes.append(len(str(tokenizers["new"].decode(counted, skip_special_tokens=True)).encode()))
    if len(numbers) < FEWEST:
        raise too_few_prompts(config, len(numbers), count_prompts(examples, config.train.loss_on))
    of_prompts = torch.zeros(len(numbers), dtype=torch.float64)
    of_prompts.index_add_(0, torch.tensor(prompt), torch.tensor(sizes, dtype=torch.float64))
    return _Chosen(encoded, torch.tensor(prompt), of_prompts)


def _per_byte(values: torch.Tensor, sizes: torch.Tensor) -> Estimate:
    """Return the sum of `values` over that of `sizes`, both (P,), with its error as a ratio estimator over prompts."""
    ratio = float(values.sum() / sizes.sum())
    residual = (values - ratio * sizes).square().sum()
    return Estimate(ratio, math.sqrt(len(sizes) / (len(sizes) - 1) * float(residual)) / float(sizes.sum()))
