"""Stage `compare_published`: the losses of the new and the published model on the same held-out examples."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config, TrainingRun
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
        "errors": "by cluster",  # comparisons of earlier versions are made again
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
    from pipeline.evaluation import cluster_errors, metrics
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
        scores[name] = metrics.score(model, encoded[name], tell)
        device = str(metrics.device_of(model))
        del model
    prompts = scores["new"].cluster
    values = {name: s.nll.double() for name, s in scores.items()}
    sizes, mean = prompts.bincount(), functools.partial(metrics.mean, cluster=prompts)
    if not by_token:
        values = {name: metrics.totals(s.nll, s.cluster) / math.log(2) for name, s in scores.items()}
        sizes, mean = chosen.sizes, functools.partial(cluster_errors.ratio, sizes=chosen.sizes)
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
        examples=chosen.examples,
        prompts=len(chosen.sizes),
        freedom=cluster_errors.freedom(sizes),
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
        encoded: the sequences by model, with the number of the prompt as cluster.
        examples: E.
        sizes: (P,) float64, bytes of the target text of each prompt's examples.
    """

    encoded: dict[str, list[Encoded]]
    examples: int
    sizes: torch.Tensor


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

    encoded: dict[str, list[Encoded]] = {name: [] for name in tokenizers}
    numbers: dict[str, int] = {}
    prompts, sizes, tokens = [], [], 0
    for example, both in encode_untruncated(config, examples, tokenizers):
        tokens += both["new"].tokens
        if len(numbers) >= FEWEST and tokens > config.evaluate.max_tokens:
            break
        number = numbers.setdefault(example.prompt(config.train.loss_on), len(numbers))
        for name, part in both.items():
            encoded[name] += [replace(sequence, cluster=number) for sequence in part.examples]
        counted = [label for sequence in both["new"].examples for label in sequence.labels if label != NO_LOSS]
        prompts.append(number)
        sizes.append(len(str(tokenizers["new"].decode(counted, skip_special_tokens=True)).encode()))
    if len(numbers) < FEWEST:
        raise too_few_prompts(config, len(numbers), count_prompts(examples, config.train.loss_on))
    of_prompts = torch.zeros(len(numbers), dtype=torch.float64)
    of_prompts.index_add_(0, torch.tensor(prompts), torch.tensor(sizes, dtype=torch.float64))
    return _Chosen(encoded, len(prompts), of_prompts)
