"""Conversations -> token ids, and which of the tokens the loss is taken on.

Which part of a rendered conversation is an answer is found out from the tokenizer's
own chat template, in one of two ways:

- A template with `{% generation %}` says it itself.
- Otherwise each answer is replaced by a probe. What the two renderings have in common
  behind the probe is behind the answer; the answer begins where the generation prompt
  ends, for that is what a model is given when it has to answer. Templates that strip
  earlier turns, add a thinking block, or trim the content are marked right that way.

The end-of-turn token after an answer belongs to it, since a model that never sees it
never stops; the white space after that token does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from pipeline.data.forms import Example, shorten
from pipeline.errors import DataError

NO_LOSS = -100  # the label that torch's cross entropy ignores
SHORTEST_WINDOW = 32  # tokens; fewer say little about a model

_CHUNK = 256  # examples tokenized at once
_PROBE = "tunepressprobe"
_CHARACTERS_PER_TOKEN = 64  # far more than any tokenizer reaches on text

Span = tuple[int, int]  # [from, to) in characters of the rendered conversation


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
    or in the tokenizer's end of text where its template has none.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        loss_on: "assistant" (every answer), "completion" (the last one), "all" (everything), or
            "auto", which is "assistant". A token counts when it is predicted, so the first never does.
        max_length: tokens; what is beyond is cut off.
        on_progress: called with conversations done and conversations in all.

    Raises:
        DataError: if the tokenizer has no chat template or is not a fast one, if the template refuses
            a conversation, or if it cannot be told which part of its output is an answer.
    """
    render = _Renderer(tokenizer)
    encoded, truncated, dropped = [], 0, 0
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        for ids, labels in _encode_chunk(chunk, render, "assistant" if loss_on == "auto" else loss_on):
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
    windows, left = [], max_tokens
    for start in range(0, len(ids), step):
        tokens = (first + ids[start : start + step])[:left]
        if len(tokens) < min(window, SHORTEST_WINDOW):
            break
        windows.append(Encoded(tokens, [NO_LOSS, *tokens[1:]]))
        left -= len(tokens)
    if not windows:
        raise DataError(f"the text has {len(ids)} tokens; at least {SHORTEST_WINDOW} are needed to measure on it")
    return windows


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, in a list, if this tokenizer puts it before text."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def _encode_chunk(
    examples: Sequence[Example], render: _Renderer, loss_on: str
) -> Iterator[tuple[list[int], list[int]]]:
    tokenizer = render.tokenizer
    conversations = [list(example.messages[: example.last_answer + 1]) for example in examples]
    texts = [render(conversation) for conversation in conversations]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for conversation, text, ids, offsets in zip(
        conversations, texts, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        if loss_on == "all":
            spans = [(0, len(text))]
        else:
            spans = render.answers(conversation, text)
            spans = spans[-1:] if loss_on == "completion" else spans
        labels = _label(ids, offsets, spans)
        end = tokenizer.eos_token_id
        if end is not None and text.rstrip().endswith(conversation[-1]["content"].strip()):
            ids, labels = [*ids, end], [*labels, end]  # a template without an end of turn
        yield ids, [NO_LOSS, *labels[1:]]


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


class _Renderer:
    """A tokenizer's chat template, and where the answers are in what it renders."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise DataError(
                f"{self.name}: no chat template; choose an instruct model, or a tokenizer with a chat template"
            )
        if not tokenizer.is_fast:
            raise DataError(f"{self.name}: not a fast tokenizer; choose a model that has a tokenizer.json")
        template = tokenizer.get_chat_template()
        self.marks_answers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        self.prompts = self._prompts_for_answers()

    def __call__(self, conversation: list[dict], **options: Any) -> Any:
        """The conversation as text; options go to `apply_chat_template`."""
        try:
            return self.tokenizer.apply_chat_template(conversation, **{"tokenize": False, **options})
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(
                f"{self.name}: its chat template refuses the conversation that begins "
                f"{shorten(conversation[0]['content'])!r}: {shorten(str(error), 120)}; "
                "change the conversation, or choose another model"
            ) from None

    def answers(self, conversation: list[dict], text: str) -> list[Span]:
        """Where the answers are in `text`, the rendered conversation, which ends with an answer."""
        spans = self._marked(conversation) if self.marks_answers else self._probed(conversation, text)
        if not spans:
            raise self._unmarkable()
        end_of_turn = text[spans[-1][1] :].rstrip()
        complete = []
        for start, end in spans:
            if text.startswith(end_of_turn, end):
                end += len(end_of_turn)
            complete.append((start, start + len(text[start:end].rstrip())))
        return complete

    def _marked(self, conversation: list[dict]) -> list[Span]:
        """The runs of tokens that the template's own `{% generation %}` marks."""
        output = self(
            conversation,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        inside = False
        for marked, (start, end) in zip(output["assistant_masks"], output["offset_mapping"], strict=True):
            if marked:
                spans.append((spans.pop()[0], end) if inside else (start, end))
            inside = bool(marked)
        return spans

    def _probed(self, conversation: list[dict], text: str) -> list[Span]:
        """The content of every answer that the template shows."""
        probe = _PROBE
        while probe in text:
            probe += "x"
        spans = []
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            probed = self([*conversation[:i], {**message, "content": probe}, *conversation[i + 1 :]])
            if probe not in probed:
                continue  # a turn that this template leaves out
            before, _, after = probed.partition(probe)
            start, end = self._start(conversation[:i], before, text), len(text) - len(after)
            if start is None or not text.endswith(after) or start > end or probe in after:
                raise self._unmarkable()
            spans.append((start, end))
        return spans

    def _start(self, earlier: list[dict], before: str, text: str) -> int | None:
        """Where the answer after `earlier` begins in `text`: behind the generation prompt if that is there."""
        if self.prompts and earlier:
            try:
                prompt = self(earlier, add_generation_prompt=True)
            except DataError:
                prompt = before
            if text.startswith(prompt):
                return len(prompt)
        return len(before) if text.startswith(before) else None

    def _prompts_for_answers(self) -> bool:
        """Whether the template has a generation prompt: some know no header before an answer."""
        question = [{"role": "user", "content": "?"}]
        try:
            return self(question, add_generation_prompt=True) != self(question)
        except DataError:
            return False

    def _unmarkable(self) -> DataError:
        return DataError(
            f"{self.name}: its chat template does not tell answers from the rest; set train.loss_on to all"
        )
