"""Tokens of conversations and texts, with marks for the tokens that the loss is taken on."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from pipeline.data.chat import ChatTemplate, Span
from pipeline.data.example import Example
from pipeline.data.rows import BadRow
from pipeline.data.supplied_template import beginning
from pipeline.errors import DataError

NO_LOSS = -100  # the label that torch's cross entropy ignores
SHORTEST_WINDOW = 32  # tokens; fewer say little about a model

_CHUNK = 256  # examples tokenized at once
_CHARACTERS_PER_TOKEN = 64  # more than any tokenizer reaches on text

IdsAndLabels = tuple[list[int], list[int]]  # of one sequence


@dataclass(frozen=True)
class Encoded:
    """One sequence: `input_ids`, and as many `labels`: the token's id, or -100 for no loss.

    Attributes:
        cluster: number of the example or document that it was made of. Sequences of one cluster depend on each other.
        rejected: of a preference pair, the sequence with the worse answer; this one has the better answer. Else None.
    """

    input_ids: list[int]
    labels: list[int]
    cluster: int = 0
    rejected: Encoded | None = None

    @property
    def prompt_length(self) -> int:
        """Return the number of tokens before the first learned one; a preference pair has them in common."""
        return next(i for i, label in enumerate(self.labels) if label != NO_LOSS)

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """Return this sequence, and of a preference pair the one with the worse answer too."""
        return (self,) if self.rejected is None else (self, self.rejected)


@dataclass(frozen=True)
class EncodedSet:
    """The sequences of conversations or texts.

    Attributes:
        examples: one sequence for each conversation that was kept, or one or more for each text, in the same order.
            A preference pair is two sequences in one.
        truncated: conversations or pairs that lost what was beyond `max_length`.
        dropped: conversations or texts left out because nothing to learn from was left of them.
        tokens: tokens in all sequences together.
        loss_tokens: those of them that the loss is taken on.
        cut: texts that became more than one sequence; nothing of them is lost.
    """

    examples: list[Encoded]
    truncated: int
    dropped: int
    tokens: int
    loss_tokens: int
    cut: int = 0


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    loss_on: str,
    max_length: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedSet:
    """Tokenize examples, and mark what is learned of them.

    Of a preference pair, the last answer is learned in both versions. The tokens before the first difference or the
    first learned token are its prompt. It is dropped if an answer or the difference of both is beyond `max_length`.

    Of a conversation, messages after the last answer are left out, so that every sequence ends in an end of
    turn, or in the tokenizer's end of text where its template has no end of turn.

    A text is learned whole, whatever `loss_on` says: beginning-of-text token where the tokenizer puts one, the
    text, end-of-text token. One that is longer than `max_length` becomes several sequences, each with the
    beginning-of-text token; the last two share what is left if the last would be shorter than 32 tokens.

    Args:
        examples: all conversations, or all texts.
        tokenizer: of transformers; for conversations a fast one with a chat template.
        loss_on: "assistant" (every answer), "completion" (the last one), "all" (everything), or
            "auto", which is "assistant". A sequence's first token never counts: nothing predicts it.
        max_length: tokens; what is beyond is cut off, or for a text, put in the next sequence.
        on_progress: called with examples done and examples in all.

    Raises:
        DataError: if the tokenizer has no chat template or is not a fast one, if the template refuses
            a conversation or leaves out a part of it, or if it cannot be told which part of its output is an answer.
    """
    are_pairs = any(example.rejected is not None for example in examples)
    if examples and examples[0].text is not None:
        chunks = _text_chunks(examples, tokenizer, max_length)
    else:
        template = ChatTemplate(tokenizer)
        chunks = _pair_chunks(examples, template) if are_pairs else _conversation_chunks(examples, template, loss_on)
    encoded, counts = [], {"truncated": 0, "dropped": 0, "cut": 0}
    done = 0
    for chunk in chunks:
        for sequences in chunk:
            parts = [Encoded(ids[:max_length], labels[:max_length], done) for ids, labels in sequences]
            kept = _joined(*parts) if are_pairs else [part for part in parts if _teaches(part)]
            counts["dropped"] += not kept
            counts["truncated"] += bool(kept) and any(len(ids) > max_length for ids, _ in sequences)
            counts["cut"] += len(kept) > 1
            encoded += kept
            done += 1
        if on_progress:
            on_progress(done, len(examples))
    return EncodedSet(
        examples=encoded,
        **counts,
        tokens=sum(len(s.input_ids) for e in encoded for s in e.sequences),
        loss_tokens=sum(label != NO_LOSS for e in encoded for s in e.sequences for label in s.labels),
    )


def accepted_examples(examples: Sequence[Example], tokenizer: Any) -> tuple[Example, ...]:
    """Return the examples without the conversations that the tokenizer's chat template refuses."""
    if not examples or examples[0].text is not None:
        return tuple(examples)
    template, accepted = ChatTemplate(tokenizer), []
    for example in examples:
        with contextlib.suppress(BadRow):
            template.check(example)
            accepted.append(example)
    return tuple(accepted)


def encode_text(text: str, tokenizer: Any, window: int, max_tokens: int) -> list[Encoded]:
    """Cut one running text into windows, as `encode_documents` does."""
    return encode_documents((text,), tokenizer, window, max_tokens)


def encode_documents(documents: Sequence[str], tokenizer: Any, window: int, max_tokens: int) -> list[Encoded]:
    """Cut documents into windows for measuring perplexity.

    Windows of a document follow each other without overlap. Each holds `window` tokens, the first of them the
    beginning-of-text token if the tokenizer puts one before any text; every token but the first of a window counts.
    The last window of a document may be shorter, down to 32 tokens.

    Args:
        documents: texts that do not depend on each other; each is a cluster.
        tokenizer: a tokenizer of transformers.
        window: tokens of a window.
        max_tokens: tokens of all windows together, at most.

    Returns:
        The first window of each document, then the second of each, and so on, up to `max_tokens`.

    Raises:
        DataError: if no document is long enough for a window.
    """
    first = beginning(tokenizer)
    step, shortest = window - len(first), min(window, SHORTEST_WINDOW)
    # The rest of a large file need not be tokenized.
    texts = [document[: max_tokens * _CHARACTERS_PER_TOKEN] for document in documents]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [
        Encoded(tokens, [NO_LOSS, *tokens[1:]], number)
        for number, document in enumerate(ids)
        for start in range(0, len(document), step)
        if len(tokens := first + document[start : start + step]) >= shortest
    ]
    if not windows:
        raise DataError(f"the text to measure on has {sum(map(len, ids))} tokens; at least {shortest} are needed")
    found, left = [], max_tokens
    for part in in_turn(windows):
        if min(left, len(part.input_ids)) < shortest:
            break
        found.append(Encoded(part.input_ids[:left], part.labels[:left], part.cluster))
        left -= len(part.input_ids)
    return found


def in_turn(sequences: Sequence[Encoded]) -> list[Encoded]:
    """Return the first sequence of each cluster, then the second of each, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for sequence in sequences:
        turns.append(seen[sequence.cluster])
        seen[sequence.cluster] += 1
    return [sequence for _, sequence in sorted(zip(turns, sequences, strict=True), key=lambda pair: pair[0])]


def _teaches(sequence: Encoded) -> bool:
    return any(label != NO_LOSS for label in sequence.labels)


def _text_chunks(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Iterator[list[list[IdsAndLabels]]]:
    """Yield the sequences of every text, some texts at a time."""
    first = beginning(tokenizer)
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    step = max(1, max_length - len(first))
    for start in range(0, len(examples), _CHUNK):
        texts = [example.text for example in examples[start : start + _CHUNK]]
        batch = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield [[_window(first + part) for part in _parts(ids + last, step)] for ids in batch]


def _parts(ids: list[int], step: int) -> list[list[int]]:
    """Return consecutive parts of `step` tokens; the last two share their tokens if the last would be short."""
    bounds = [*range(0, len(ids), step), len(ids)]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < min(SHORTEST_WINDOW, step):
        bounds[-2] = (bounds[-3] + bounds[-1] + 1) // 2
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]


def _window(ids: list[int]) -> IdsAndLabels:
    return ids, [NO_LOSS, *ids[1:]]


def _conversation_chunks(
    examples: Sequence[Example], template: ChatTemplate, loss_on: str
) -> Iterator[list[list[IdsAndLabels]]]:
    """Yield the one sequence of every conversation, some conversations at a time."""
    for start in range(0, len(examples), _CHUNK):
        yield [[sequence] for sequence in _encode_chunk(examples[start : start + _CHUNK], template, loss_on)]


def _pair_chunks(pairs: Sequence[Example], template: ChatTemplate) -> Iterator[list[list[IdsAndLabels]]]:
    """Yield the two sequences of every preference pair, some pairs at a time; their last answers are learned."""
    for start in range(0, len(pairs), _CHUNK):
        both = [one for pair in pairs[start : start + _CHUNK] for one in pair.alternatives]
        sequences = list(_encode_chunk(both, template, "completion"))
        yield [sequences[i : i + 2] for i in range(0, len(sequences), 2)]


def _joined(better: Encoded, worse: Encoded) -> list[Encoded]:
    """Return a preference pair as one sequence with the other in it; nothing if no difference is left to learn.

    Every token after their common prompt is learned. Tokens after the end of turn are left out.
    """
    if not (_teaches(better) and _teaches(worse)) or better.input_ids == worse.input_ids:
        return []
    shared = len(commonprefix([better.input_ids, worse.input_ids]))
    start = min(shared, better.prompt_length, worse.prompt_length)

    def answer(sequence: Encoded) -> Encoded:
        end = max(i for i, label in enumerate(sequence.labels, start=1) if label != NO_LOSS)
        ids = sequence.input_ids[:end]
        return Encoded(ids, [NO_LOSS] * start + ids[start:], sequence.cluster)

    return [replace(answer(better), rejected=answer(worse))]


def _encode_chunk(examples: Sequence[Example], template: ChatTemplate, loss_on: str) -> Iterator[IdsAndLabels]:
    """Yield ids and labels of each conversation, before truncation."""
    texts, spans = [], []
    end_of_text = template.tokenizer.eos_token_id
    ending = [] if template.ends_turns or end_of_text is None else [end_of_text]
    for example in examples:
        text = template.render_example(example)
        spans.append(template.learned_spans(example, text, loss_on))
        texts.append(text if template.ends_turns else text.rstrip())
    batch = template.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets, marked in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True):
        labels = _label(ids, offsets, marked)
        yield ids + ending, [NO_LOSS, *labels[1:], *ending]


def _label(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """Return the ids of all tokens that reach into a span, and -100 for the others; spans are in order."""
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
