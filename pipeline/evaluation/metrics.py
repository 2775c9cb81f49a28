"""Perplexity, KL divergence, agreement, speed and sample answers of a loaded model.

A model is scored once: its loss at every counted token, its first choice, and its last
hidden states. The reference's hidden states are kept on disk; what a variant is compared
with is computed from them and the reference's output head, so that the reference and the
variant are never in memory together and no logits are stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.data.chat import on_one_day
from pipeline.errors import ModelError
from pipeline.evaluation.model_result import Answer, Estimate
from pipeline.inference.output_head import Head, check_head, device_of, head_of, logits_of
from pipeline.inference.throughput import NEW_TOKENS, PROMPT_TOKENS, REPEATS, tokens_per_second
from pipeline.models.safe_loading import open_config
from pipeline.system.files import read_json

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.data.encode import Encoded
    from pipeline.inference.llama_cpp import Reader
    from pipeline.quantization.grid import GroupQuantized

BATCH_TOKENS = 2048
ANSWER_TOKENS = 64
IGNORED = -100

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the reference: nats a token, and the share of tokens with the same first choice."""

    kl: Estimate
    agreement: Estimate


@dataclass(frozen=True)
class Scores:
    """What a model said of a text. T is the number of counted tokens.

    Attributes:
        nll: (T,) float32, negative log-likelihood of each token in nats.
        choice: (T,) int64, the token that the model held likeliest.
        sequence: (T,) int64, which sequence a token belongs to.
        hidden: (T, H), the last hidden states, from which the logits follow; None of a model that does not tell them.
    """

    nll: torch.Tensor
    choice: torch.Tensor
    sequence: torch.Tensor
    hidden: torch.Tensor | None

    def save(self, path: Path, head: str = "") -> None:
        """Write the scores to a file, with the checkpoint's name for the model's output matrix."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"nll": self.nll, "choice": self.choice, "sequence": self.sequence, "hidden": self.hidden}
        save_file(tensors, path, {"head": head})

    @classmethod
    def load(cls, path: Path) -> Scores:
        return cls(**load_file(path))

    @staticmethod
    def saved_head(path: Path) -> str:
        """Return the checkpoint's name for the output matrix of the model whose scores are in a file."""
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("head")
        return known or read_json(path.with_name("head.json"), {})["name"]  # of an earlier release


@torch.no_grad()
def score(model: PreTrainedModel, sequences: Sequence[Encoded], on_progress: Progress | None = None) -> Scores:
    """Score every counted token (label not -100) of `sequences`.

    Raises:
        ModelError: where the model's logits are not its hidden states times its head, or are
            not finite, and where no token counts.
    """
    backbone, head, device = _backbone(model), head_of(model), device_of(model)
    if not any(label != IGNORED for s in sequences for label in s.labels[1:]):
        raise ModelError("the text to measure on has no token that counts")
    check_head(model, backbone, head, sequences[0].input_ids[:16])
    done, total = 0, sum(len(s.input_ids) for s in sequences)
    counts = torch.tensor([sum(label != IGNORED for label in s.labels[1:]) for s in sequences])
    starts = (counts.cumsum(0) - counts).tolist()
    sequence = torch.arange(len(sequences)).repeat_interleave(counts)
    # All at once: what is kept of each batch by itself would keep the memory of the batch, among which it lies.
    nll, choice = torch.empty(len(sequence)), torch.empty(len(sequence), dtype=torch.long)
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
            hidden = torch.empty(len(sequence), states.shape[1], dtype=states.dtype)
        hidden[places] = states.cpu()
        done += sum(len(sequences[i].input_ids) for i in batch)
        if on_progress:
            on_progress(done, total)
    return Scores(nll, choice, sequence, hidden)


def mean(values: torch.Tensor, sequence: torch.Tensor) -> Estimate:
    """The mean over tokens, with a standard error that allows for tokens of one sequence going together.

    The error is that of a ratio estimator with sequences as clusters: tokens of one
    text are not independent, and a naive error would be too small.
    """
    values = values.double()
    _, cluster = sequence.unique(return_inverse=True)
    clusters = int(cluster.max()) + 1
    average = values.mean()
    residual = torch.zeros(clusters, dtype=torch.float64).index_add_(0, cluster, values - average)
    correction = clusters / (clusters - 1) if clusters > 1 else math.nan
    error = math.sqrt(correction * float(residual.square().sum())) / len(values)
    return Estimate(float(average), error)


def perplexity(scores: Scores) -> Estimate:
    """Exp of the mean loss; its error by the delta method."""
    loss = mean(scores.nll, scores.sequence)
    value = math.exp(loss.value)
    return Estimate(value, value * loss.stderr)


@torch.no_grad()
def divergence(
    scores: Scores,
    head: torch.Tensor | GroupQuantized,
    reference: Scores,
    reference_head: torch.Tensor,
    softcap: float | None = None,
    on_progress: Progress | None = None,
) -> Divergence:
    """Return KL(reference || model), and how often both have the same first choice.

    Args:
        head, reference_head: output matrices (V, H) that turn hidden states into logits.
    """
    kl = torch.empty(len(scores.nll))  # at once: a small tensor kept of every tile would keep the tile's memory
    heads = (Head(head, softcap), Head(reference_head, softcap))
    _refuse_other_tokens(scores.sequence, reference)
    for (rows, ours), (_, theirs) in zip(
        logits_of(heads[0], scores.hidden), logits_of(heads[1], reference.hidden), strict=True
    ):
        kl[rows] = _kl(theirs, ours).cpu()
        if on_progress:
            on_progress(rows.stop, len(scores.nll))
    return _compared(scores, reference, kl)


def counted_logits(reader: Reader, sequences: Sequence[Encoded]) -> Iterator[torch.Tensor]:
    """Logits (n, V) float32 of llama.cpp at every counted token of `sequences` in order, some at a time."""
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
    reference_head: torch.Tensor,
    softcap: float | None = None,
    on_progress: Progress | None = None,
) -> tuple[Scores, Divergence]:
    """Return what `score` and `divergence` find, of a model that gives its logits and nothing else.

    Args:
        logits: (n, V) float32, at every counted token of `sequences` in order, some at a time.

    Raises:
        ModelError: where the reference was scored on other tokens.
    """
    targets = torch.tensor([label for s in sequences for label in s.labels[1:] if label != IGNORED])
    counts = torch.tensor([sum(label != IGNORED for label in s.labels[1:]) for s in sequences])
    sequence = torch.arange(len(sequences)).repeat_interleave(counts)
    _refuse_other_tokens(sequence, reference)
    head = Head(reference_head, softcap)
    nll, choice, kl, start = torch.empty(len(targets)), torch.empty_like(targets), torch.empty(len(targets)), 0
    for ours in logits:
        rows = slice(start, start + len(ours))
        nll[rows] = token_losses(ours, targets[rows])
        choice[rows] = ours.argmax(-1)
        kl[rows] = _kl(head(reference.hidden[rows]), ours)
        start = rows.stop
        if on_progress:
            on_progress(start, len(targets))
    scores = Scores(nll, choice, sequence, hidden=None)
    return scores, _compared(scores, reference, kl)


def _refuse_other_tokens(sequence: torch.Tensor, reference: Scores) -> None:
    if not torch.equal(sequence, reference.sequence):
        raise ModelError("the two models were not scored on the same tokens; score both again")


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (n,) in nats of `targets` (n,) under logits (n, V)."""
    return -logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def _kl(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) of logits (n, V), (n,)."""
    target, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return (target.exp() * (target - log_q)).sum(-1)


def _compared(scores: Scores, reference: Scores, kl: torch.Tensor) -> Divergence:
    agreement = (scores.choice == reference.choice).float()
    return Divergence(mean(kl, scores.sequence), mean(agreement, scores.sequence))


def rise(scores: Scores, reference: Scores) -> Estimate:
    """The relative rise in perplexity over the reference, paired token by token."""
    difference = mean(scores.nll - reference.nll, scores.sequence)
    ratio = math.exp(difference.value)
    return Estimate(ratio - 1, ratio * difference.stderr)


@torch.no_grad()
def speed(
    model: PreTrainedModel,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
) -> dict[str, float]:
    """Tokens per second at batch 1: reading a prompt, and writing after it. Medians.

    Prompt and answer are shortened to what the model's positions hold.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)

    def read(count: int):
        return model(prompt[:, :count], use_cache=True, logits_to_keep=1)

    def write(out):
        token = out.logits[:, -1:].argmax(-1)
        return model(token, past_key_values=out.past_key_values, use_cache=True)

    limit = getattr(model.config, "max_position_embeddings", None)
    return tokens_per_second(read, write, limit, prompt_tokens, new_tokens, repeats, lambda: _now(model))


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int = ANSWER_TOKENS
) -> list[Answer]:
    """Return greedy answers, without sampling, so that they differ only where the models do.

    A model without a chat template goes on from the prompt as it stands.
    """
    found = []
    for prompt in prompts:
        inputs = question(tokenizer, prompt).to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
        )
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(Answer(prompt=prompt, answer=text.strip()))
    return found


def question(tokenizer: PreTrainedTokenizerBase, prompt: str) -> BatchEncoding:
    """What a model is given to answer `prompt`: `input_ids` (1, T) and their mask."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=on_one_day(tokenizer.get_chat_template()),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def stop_tokens(folder: Path) -> set[int]:
    """The tokens at which the model in `folder` ends an answer in transformers."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(folder)
    else:
        settings = GenerationConfig.from_model_config(open_config(folder))
    ends = settings.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def _backbone(model: PreTrainedModel) -> torch.nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def _batches(sequences: Sequence[Encoded]) -> list[list[int]]:
    """Sequences of similar length together, at most BATCH_TOKENS with their padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    batches: list[list[int]] = [[]]
    for index in order:  # ascending, so the newest is the longest
        if batches[-1] and (len(batches[-1]) + 1) * len(sequences[index].input_ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
