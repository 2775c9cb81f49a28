"""The texts that every model of a run is measured on, as tokens.

Held-out text is the held-out split of the data set, with the loss mask of training. General text is the text that the
configuration names, cut into windows.

Tokens of one document, or of the answers to one prompt, depend on each other: they are a cluster. If not everything is
measured, each cluster gives its first sequence before any gives a second one, so that errors come from many clusters.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.config.schema import Config, MeasuredRun, TrainingRun
from pipeline.data import Example, general_documents, general_text, read_examples
from pipeline.data.encode import (
    Encoded,
    accepted_examples,
    encode_documents,
    encode_examples,
    encode_text,
    in_turn,
)
from pipeline.data.supplied_template import supply_template
from pipeline.errors import DataError
from pipeline.evaluation.model_result import GENERAL, HELD_OUT
from pipeline.models.context import context_length
from pipeline.system import hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of a window of general text. A short text has shorter windows, because an error needs several windows.
WINDOW, WINDOWS = 1024, 16
SAMPLE_TOKENS = 256  # of general text, to time the measurement
FEWEST_TOKENS = 1024  # measured even if they take longer than the limit
COMPARED = 1.5  # time to score and compare a variant, relative to the time to score a model

AnyRun = TypeVar("AnyRun", bound=Config)


@dataclass(frozen=True)
class RunTexts:
    """The texts that all models of a run are measured on, and the folder with the reference's scores.

    Attributes:
        held_out: JSON Lines file of the held-out examples.
        reference: folder for the scores of the full-precision model.
        template: the chat template that the configuration chooses for training.
        template_was_supplied: True if the base model has no chat template and training supplied one.
        plan: the number of tokens that fit into `evaluate.max_minutes`; empty before there is a plan.
        keep_plan: stores a plan for the models that are measured later.
    """

    held_out: Path
    reference: Path
    template: str | None = None
    template_was_supplied: bool = False
    plan: Mapping = field(default_factory=dict)
    keep_plan: Callable[[dict], object] = lambda plan: None

    def reference_scores(self, text: str) -> Path:
        """Return the file with the scores of the full-precision model on a text."""
        return self.reference / f"{text}.safetensors"


def plan_tokens(
    config: MeasuredRun, texts: RunTexts, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RunTexts:
    """Return the texts with a plan of how many tokens are measured, made once for a run.

    There is a plan only if `evaluate.max_minutes` limits the time. The first model that is measured reads a part of the
    general text twice, and the second time shows how long a token takes. All models are measured on the same tokens.
    """
    from pipeline.evaluation import metrics

    asked = _asked(config)
    timed = {"model": config.model.model_dump(mode="json"), "machine": hardware.cpu_name(), "cores": hardware.cores()}
    kept = texts.plan
    if asked["max_minutes"] is None or (kept.get("asked") == asked and kept.get("timed") == timed):
        return texts
    window = min(SAMPLE_TOKENS, context_length(model.config.to_dict()) or SAMPLE_TOKENS)
    sample = encode_text(general_text(config.evaluate.general), tokenizer, window, SAMPLE_TOKENS)
    metrics.score(model, sample)
    start = time.perf_counter()
    metrics.score(model, sample)
    seconds = COMPARED * (time.perf_counter() - start) / sum(len(s.input_ids) for s in sample)
    fitting = 60 * asked["max_minutes"] / ((2 if config.data else 1) * seconds)
    tokens = max(FEWEST_TOKENS, int(fitting) // WINDOWS * WINDOWS)
    tokens = min(tokens, asked["max_tokens"])
    plan = {"asked": asked, "max_tokens": tokens, "timed": timed}
    texts.keep_plan(plan)
    return replace(texts, plan=plan)


def apply_plan(config: AnyRun, kept: Mapping) -> AnyRun:
    """Return the configuration with as many tokens to measure on as the plan `kept` allows."""
    if not isinstance(config, MeasuredRun) or kept.get("asked") != _asked(config):
        return config
    tokens = min(kept["max_tokens"], config.evaluate.max_tokens)
    evaluate = config.evaluate.model_copy(update={"max_tokens": tokens})
    return config.model_copy(update={"evaluate": evaluate})


def _asked(config: MeasuredRun) -> dict:
    return config.evaluate.model_dump(include={"max_tokens", "max_minutes"})


def held_out(
    config: TrainingRun, texts: RunTexts, tokenizer: PreTrainedTokenizerBase, by_cluster: bool = True
) -> list[Encoded]:
    """Return the held-out examples to measure on, up to `evaluate.max_tokens` tokens of input.

    Without `by_cluster` they are in the order of the file, as releases of earlier versions were measured.
    """
    config = apply_plan(config, texts.plan)
    examples = read_examples(texts.held_out)
    if config.data.on_bad_row == "skip":  # in data that is read again, training has left them out
        examples = accepted_examples(examples, tokenizer)
    encoded = encode_examples(examples, tokenizer, config.train.loss_on, config.train.max_length).examples
    return first_examples(config, examples if by_cluster else examples[:1] * len(examples), encoded)


def first_examples(
    config: TrainingRun, examples: Sequence[Example], encoded: Sequence[Encoded], max_tokens: int | None = None
) -> list[Encoded]:
    """Return held-out sequences with their clusters, up to a number of tokens.

    Args:
        config: the run.
        examples: all held-out examples. Those with the same prompt are one cluster.
        encoded: their sequences, as `encode_examples` returns them.
        max_tokens: tokens of their input; None for `evaluate.max_tokens`.

    Raises:
        DataError: if there are fewer than two sequences.
    """
    taken: list[Encoded] = []
    tokens = 0
    numbers: dict[str, int] = {}
    clusters = [numbers.setdefault(example.prompt(config.train.loss_on), len(numbers)) for example in examples]
    for example in in_turn([replace(sequence, cluster=clusters[sequence.cluster]) for sequence in encoded]):
        tokens += len(example.input_ids)
        if len(taken) >= 2 and tokens > (max_tokens or config.evaluate.max_tokens):
            break
        taken.append(example)
    if len(taken) < 2:
        raise DataError(
            f"{config.data.named}: fewer than two held-out examples have an answer within train.max_length "
            f"({config.train.max_length} tokens). Try: raise data.held_out, train.max_length or evaluate.max_tokens"
        )
    return taken


def general(
    config: MeasuredRun, tokenizer: PreTrainedTokenizerBase, context: int | None, by_cluster: bool = True
) -> list[Encoded]:
    """Return the general text in windows, up to `evaluate.max_tokens` tokens; each document is a cluster.

    Args:
        config: the run.
        tokenizer: the model's.
        context: the longest window that the model reads, in tokens; None if it has no limit.
        by_cluster: False for one running text, as releases of earlier versions were measured.

    Raises:
        DataError: if the text is shorter than two windows.
    """
    source = config.evaluate.general
    documents = general_documents(source) if by_cluster else (general_text(source),)
    return _general(config, tokenizer, context, documents, config.evaluate.max_tokens)


def general_unmeasured(
    config: MeasuredRun, tokenizer: PreTrainedTokenizerBase, context: int | None, tokens: int
) -> list[Encoded]:
    """Return windows of the general text that `general` leaves out, to choose settings on; at most `tokens` tokens.

    Documents that are not measured at all come first.

    Raises:
        DataError: if `general` measures the whole text.
    """
    documents = general_documents(config.evaluate.general)
    every = sum(map(len, documents)) + 1  # more than the tokens of all windows
    measured, windows = (
        _general(config, tokenizer, context, documents, most) for most in (config.evaluate.max_tokens, every)
    )
    known = {window.cluster for window in measured}
    found, left = [], tokens
    for window in sorted(windows[len(measured) :], key=lambda window: window.cluster in known):
        if len(window.input_ids) <= left:
            found.append(window)
            left -= len(window.input_ids)
    if not found:
        raise DataError(
            f"evaluate.general {config.evaluate.general}: has no text beyond the measured one to choose layers on. "
            "Try: a longer text, or lower evaluate.max_tokens"
        )
    return found


def _general(
    config: MeasuredRun,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    documents: Sequence[str],
    max_tokens: int,
) -> list[Encoded]:
    """Return up to `max_tokens` tokens of documents, in windows that depend on `evaluate.max_tokens`."""
    counted = sum(map(len, tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]))
    window = min(WINDOW, context or WINDOW, max(2, min(config.evaluate.max_tokens, counted) // WINDOWS))
    windows = encode_documents(documents, tokenizer, window, max_tokens)
    if len(windows) < 2:
        raise DataError(f"evaluate.general {config.evaluate.general}: too short to measure on. Try: a longer text")
    return windows


def all_texts(
    config: MeasuredRun, texts: RunTexts, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> dict[str, list[Encoded]]:
    """Return the texts by name, for a model with this context; there is held-out text only if there is a data set."""
    kept = {HELD_OUT: held_out(config, texts, tokenizer)} if isinstance(config, TrainingRun) else {}
    return kept | {GENERAL: general(apply_plan(config, texts.plan), tokenizer, context)}


def digest(sequences: Sequence[Encoded]) -> str:
    """Return a digest of a text as tokens and labels; figures with the same digest can be compared."""
    told = hashlib.sha256()
    for sequence in sequences:
        told.update(json.dumps([sequence.input_ids, sequence.labels]).encode())
    return told.hexdigest()[:24]


def restore_template(tokenizer: PreTrainedTokenizerBase, texts: RunTexts) -> PreTrainedTokenizerBase:
    """Return the tokenizer of training: with the chosen chat template, or the supplied one if the base has none."""
    if texts.template:
        tokenizer.chat_template = texts.template
    elif texts.template_was_supplied:
        supply_template(tokenizer)
    return tokenizer
