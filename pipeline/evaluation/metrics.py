"""Perplexity, KL divergence and agreement of a loaded model.

A model is scored once: its loss at every counted token, its first choice, and its last hidden states. The hidden states
of the reference are kept on disk, and its logits are computed from them. So the reference and a variant are never in
memory together, and no logits are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.evaluation import cluster_errors
from pipeline.evaluation.model_result import Estimate
from pipeline.inference.output_head import Head, HeadNames, check_head, device_of, head_of, logits_of
from pipeline.system.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.data.encode import Encoded
    from pipeline.inference.llama_cpp import Reader

BATCH_TOKENS = 2048
IGNORED = -100

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Divergence:
    """The distance of a model from the reference: `kl` in nats per token, and `agreement` as a share of tokens."""

    kl: Estimate
    agreement: Estimate


@dataclass(frozen=True)
class Scores:
    """The scores of a model on a text with T counted tokens.

    Attributes:
        nll: (T,) float32, negative log-likelihood of each token in nats.
        choice: (T,) int64, the most likely token for the model.
        cluster: (T,) int64, the cluster of each token: only tokens of different clusters are independent.
        hidden: (T, H), the last hidden states, which give the logits; None for llama.cpp, which does not show them.
    """

    nll: torch.Tensor
    choice: torch.Tensor
    cluster: torch.Tensor
    hidden: torch.Tensor | None

    @property
    def states(self) -> torch.Tensor:
        """The last hidden states of a model that shows them, (T, H)."""
        assert self.hidden is not None, "only scores of `score` have hidden states"
        return self.hidden

    def save(self, path: Path, head: HeadNames) -> None:
        """Write the scores to a file, with the names of the output head in the checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"nll": self.nll, "choice": self.choice, "cluster": self.cluster, "hidden": self.states}
        save_file(tensors, path, {"head": head.weight, "head_bias": head.bias or ""})

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Return the scores in a file."""
        return cls(**load_file(path))

    @staticmethod
    def saved_head(path: Path) -> HeadNames:
        """Return the names of the output head in the checkpoint of the scored model."""
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
        weight = known.get("head") or read_json(path.with_name("head.json"), {})["name"]  # of an earlier release
        return HeadNames(weight, known.get("head_bias") or None)


@torch.no_grad()
def score(model: PreTrainedModel, sequences: Sequence[Encoded], on_progress: Progress | None = None) -> Scores:
    """Score every counted token (label not -100) of `sequences`.

    Raises:
        ModelError: if the logits are more than `output_head.Head` computes, if they are not finite, or if no token
            counts.
    """
    backbone, head, device = _backbone(model), head_of(model), device_of(model)
    if not any(label != IGNORED for s in sequences for label in s.labels[1:]):
        raise ModelError("the text to measure on has no token that counts")
    check_head(model, backbone, head, sequences[0].input_ids[:16])
    done, total = 0, sum(len(s.input_ids) for s in sequences)
    counts, cluster = _counts(sequences), clusters(sequences)
    starts = (counts.cumsum(0) - counts).tolist()
    # One tensor for all batches: a small tensor from each batch would keep the memory of the batch.
    nll, choice = torch.empty(len(cluster)), torch.empty(len(cluster), dtype=torch.long)
    hidden = None
    for batch in _batches(sequences):
        longest = max(len(sequences[i].input_ids) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), IGNORED, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, index in enumerate(batch):
            length = len(sequences[index].input_ids)
            ids[row, :length] = torch.tensor(sequences[index].input_ids)
            labels[row, :length] = torch.tensor(sequences[index].labels)
            mask[row, :length] = 1
        seen = backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]
        counted = labels[:, 1:] != IGNORED  # position t predicts token t + 1
        states, targets = seen[:, :-1][counted.to(device)], labels[:, 1:][counted].to(device)
        places = torch.cat([torch.arange(starts[i], starts[i] + int(counts[i])) for i in batch])
        for rows, logits in logits_of(head, states):
            nll[places[rows]] = token_losses(logits, targets[rows]).cpu()
            choice[places[rows]] = logits.argmax(-1).cpu()
        if hidden is None:
            hidden = torch.empty(len(cluster), states.shape[1], dtype=states.dtype)
        hidden[places] = states.cpu()
        done += sum(len(sequences[i].input_ids) for i in batch)
        if on_progress:
            on_progress(done, total)
    if not nll.isfinite().all():
        raise ModelError(f"{model.config.model_type}: its loss is not finite for some tokens. Try: another model")
    return Scores(nll, choice, cluster, hidden)


def _counts(sequences: Sequence[Encoded]) -> torch.Tensor:
    """Return the counted tokens of each sequence, (S,)."""
    return torch.tensor([sum(label != IGNORED for label in s.labels[1:]) for s in sequences])


def clusters(sequences: Sequence[Encoded]) -> torch.Tensor:
    """Return the cluster of each counted token, (T,)."""
    return torch.tensor([s.cluster for s in sequences]).repeat_interleave(_counts(sequences))


def mean(values: torch.Tensor, cluster: torch.Tensor) -> Estimate:
    """Return the mean over tokens, (T,), with its error for tokens that depend on each other within a cluster."""
    return cluster_errors.ratio(totals(values, cluster), cluster.unique(return_counts=True)[1])


def totals(values: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
    """Return the sum of values of tokens, (T,), in each cluster, (C,) float64."""
    known, cluster = cluster.unique(return_inverse=True)
    return torch.zeros(len(known), dtype=torch.float64).index_add_(0, cluster, values.double())


def freedom(cluster: torch.Tensor) -> float:
    """Return the degrees of freedom of the errors of `mean`."""
    return cluster_errors.freedom(cluster.unique(return_counts=True)[1])


def perplexity(scores: Scores) -> Estimate:
    """Return the exponential of the mean loss, with an error by the delta method."""
    loss = mean(scores.nll, scores.cluster)
    value = math.exp(loss.value)
    return Estimate(value, value * loss.stderr)


@torch.no_grad()
def divergence(
    scores: Scores,
    head: Head,
    reference: Scores,
    reference_head: Head,
    on_progress: Progress | None = None,
) -> Divergence:
    """Return KL(reference || model), and the share of tokens at which both have the same first choice.

    Args:
        scores: the scores of the model.
        head: its output head.
        reference: the scores of the reference on the same text.
        reference_head: its output head.
        on_progress: called with the compared tokens, and all tokens.

    Raises:
        ModelError: if the models were scored on different tokens.
    """
    kl = torch.empty(len(scores.nll))  # one tensor for all tiles, as in `score`
    _refuse_other_tokens(scores.cluster, reference)
    for (rows, ours), (_, theirs) in zip(
        logits_of(head, scores.states), logits_of(reference_head, reference.states), strict=True
    ):
        kl[rows] = _kl(theirs, ours).cpu()
        if on_progress:
            on_progress(rows.stop, len(scores.nll))
    return _compared(scores, reference, kl)


def counted_logits(reader: Reader, sequences: Sequence[Encoded]) -> Iterator[torch.Tensor]:
    """Yield the logits of llama.cpp at the counted tokens of `sequences` in order, in parts (n, V) float32."""
    for sequence in sequences:
        counted = [label != IGNORED for label in sequence.labels[1:]]  # position t predicts token t + 1
        reader.begin()
        for logits in reader.read(sequence.input_ids[:-1], counted):
            yield torch.from_numpy(logits)


@torch.no_grad()
def compare_logits(
    logits: Iterable[torch.Tensor],
    sequences: Sequence[Encoded],
    reference: Scores,
    reference_head: Head,
    on_progress: Progress | None = None,
) -> tuple[Scores, Divergence]:
    """Return scores and divergence of a model that shows only its logits.

    Args:
        logits: the logits at the counted tokens of `sequences` in order, in parts (n, V) float32.
        sequences: the text.
        reference: the scores of the reference on the same text.
        reference_head: its output head.
        on_progress: called with the compared tokens, and all tokens.

    Raises:
        ModelError: if the reference was scored on different tokens.
    """
    targets = torch.tensor([label for s in sequences for label in s.labels[1:] if label != IGNORED])
    cluster = clusters(sequences)
    _refuse_other_tokens(cluster, reference)
    nll, choice, kl, start = torch.empty(len(targets)), torch.empty_like(targets), torch.empty(len(targets)), 0
    for ours in logits:
        rows = slice(start, start + len(ours))
        nll[rows] = token_losses(ours, targets[rows])
        choice[rows] = ours.argmax(-1)
        kl[rows] = _kl(reference_head(reference.states[rows]), ours)
        start = rows.stop
        if on_progress:
            on_progress(start, len(targets))
    scores = Scores(nll, choice, cluster, hidden=None)
    return scores, _compared(scores, reference, kl)


def _refuse_other_tokens(cluster: torch.Tensor, reference: Scores) -> None:
    if not torch.equal(cluster, reference.cluster):
        raise ModelError("the two models were not scored on the same tokens. Try: score both again")


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood (n,) in nats of `targets` (n,) under logits (n, V)."""
    return -logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _kl(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Return KL(theirs || ours), (n,), of logits (n, V)."""
    target, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return (target.exp() * (target - log_q)).sum(-1)


def _compared(scores: Scores, reference: Scores, kl: torch.Tensor) -> Divergence:
    agreement = (scores.choice == reference.choice).float()
    return Divergence(mean(kl, scores.cluster), mean(agreement, scores.cluster))


def rise(scores: Scores, reference: Scores) -> Estimate:
    """Return the relative rise of perplexity over the reference, paired token by token."""
    difference = mean(scores.nll - reference.nll, scores.cluster)
    ratio = math.exp(difference.value)
    return Estimate(ratio - 1, ratio * difference.stderr)


def _backbone(model: PreTrainedModel) -> torch.nn.Module:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner.base_model


def _batches(sequences: Sequence[Encoded]) -> list[list[int]]:
    """Return batches of sequences with similar lengths, each of at most BATCH_TOKENS with its padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    batches: list[list[int]] = [[]]
    for index in order:  # ascending, so the newest is the longest
        if batches[-1] and (len(batches[-1]) + 1) * len(sequences[index].input_ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches
