"""Conversations and text -> token ids, and which of the tokens the loss is taken on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.chat import ChatTemplate, Span
from pipeline.data.forms import Example
from pipeline.errors import DataError

NO_LOSS = -100  # the label that torch's cross entropy ignores
SHORTEST_WINDOW = 32  # tokens; fewer say little about a model

_CHUNK = 256  # conversations tokenized at once
_CHARACTERS_PER_TOKEN = 64  # more than any tokenizer reaches on text


@dataclass(frozen=True)
class Encoded:
    """One sequence: `input_ids`, and as many `labels`: the token's id, or -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EncodedSet:
    """What conversations became.

    Attributes:
        examples: one sequence for each conversation that was kept, in the same order.
        truncated: how many of them were cut at `max_length`.
        dropped: conversations left out because nothing to learn from was left of them.
        tokens: tokens in all sequences together.
        loss_tokens: those of them that the loss is taken on.
    """

    examples: list[Encoded]
    truncated: int
    dropped: int
    tokens: int
    loss_tokens: int


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    loss_on: str,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedSet:
    """Render, tokenize and mark conversations.

    Messages after the last answer are left out, so that every sequence ends in an end of turn,
    or in the tokenizer's end of text where its template has no end of turn.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        loss_on: "assistant" (every answer), "completion" (the last one), "all" (everything), or
            "auto", which is "assistant". A sequence's first token never counts: nothing predicts it.
        max_length: tokens; what is beyond is cut off.
        on_progress: called with conversations done and conversations in all.

    Raises:
        DataError: if the tokenizer has no chat template or is not a fast one, if the template refuses
            a conversation, or if it cannot be told which part of its output is an answer.
    """
    template = ChatTemplate(tokenizer)
    encoded, truncated, dropped = [], 0, 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        for ids, labels in _encode_chunk(chunk, template, loss_on):
            sequence = Encoded(ids[:max_length], labels[:max_length])
            if all(label == NO_LOSS for label in sequence.labels):
                dropped += 1
                continue
            truncated += len(ids) > max_length
            encoded.append(sequence)
        if on_progress:
            on_progress(start + len(chunk), len(examples))
    return EncodedSet(
        examples=encoded,
        truncated=truncated,
        dropped=dropped,
        tokens=sum(len(e.input_ids) for e in encoded),
        loss_tokens=sum(label != NO_LOSS for e in encoded for label in e.labels),
    )


def encode_text(text: str, tokenizer: Any, window: int, max_tokens: int) -> list[Encoded]:
    """Cut running text into windows for measuring perplexity.

    Windows follow each other without overlap. Each holds `window` tokens, the first of them the
    beginning-of-text token if the tokenizer puts one before any text; every token but the first
    of a window counts. The last window may be shorter, down to 32 tokens.

    Args:
        max_tokens: tokens of all windows together, at most.

    Raises:
        DataError: if the text is too short for a single window.
    """
    first = _beginning(tokenizer)
    text = text[: max_tokens * _CHARACTERS_PER_TOKEN]  # the rest of a large file need not be tokenized
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = window - len(first)
    shortest = min(window, SHORTEST_WINDOW)
    windows: list[Encoded] = []
    left = max_tokens
    for start in range(0, len(ids), step):
        tokens = (first + ids[start : start + step])[:left]
        if len(tokens) < shortest:
            break
        windows.append(Encoded(tokens, [NO_LOSS, *tokens[1:]]))
        left -= len(tokens)
    if not windows:
        raise DataError(f"the text to measure on has {len(ids)} tokens; at least {shortest} are needed")
    return windows


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, in a list, if this tokenizer puts it before text."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _encode_chunk(
    examples: Sequence[Example], template: ChatTemplate, loss_on: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation, before truncation."""
    texts, spans = [], []
    end_of_text = template.tokenizer.eos_token_id
    ending = [] if template.ends_turns or end_of_text is None else [end_of_text]
    for example in examples:
        conversation = list(example.messages[: example.last_answer + 1])
        text = template.render(conversation)
        answers = [(0, len(text))] if loss_on == "all" else template.answers(conversation, text)
        spans.append(answers[-1:] if loss_on == "completion" else answers)
        texts.append(text if template.ends_turns else text.rstrip())
    batch = template.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets, marked in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True):
        labels = _label(ids, offsets, marked)
        yield ids + ending, [NO_LOSS, *labels[1:], *ending]


def _label(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """The ids of all tokens that reach into a span, and -100 for the others; spans are in order."""
    labels = [NO_LOSS] * len(ids)
    remaining = iter(spans)
    span = next(remaining, None)
    for i, (start, end) in enumerate(offsets):
        while span and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        if end > span[0]:
            labels[i] = ids[i]
    return labels
