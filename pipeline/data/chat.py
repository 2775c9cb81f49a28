"""The text that a chat template makes of a conversation, and the places of the answers in it.

Where they are is found out from the template itself, in one of two ways:

- A template with `{% generation %}` says it.
- Otherwise each answer is replaced by a probe. What the two renderings have in common
  behind the probe is behind the answer; the answer begins where the generation prompt
  ends, for that is what a model is given when it has to answer. Templates that strip
  earlier turns, add a thinking block, or trim the content are marked right that way.

The end-of-turn token after an answer belongs to it, since a model that never sees it
never stops; the white space after that token does not. So do the reasoning before it, and its calls of tools.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pipeline.data.example import Example, is_learned
from pipeline.data.messages import Message
from pipeline.data.rows import BadRow, shorten
from pipeline.data.template_choice import default_template
from pipeline.data.template_style import PROBE, Style, find_style, is_plain, on_one_day
from pipeline.data.tools import Tool
from pipeline.errors import DataError

Span = tuple[int, int]  # [from, to) in characters of the rendered conversation


class TemplateRefusal(DataError):
    """A conversation that a chat template refuses, or does not write whole."""


class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        ends_turns: whether it writes anything after an answer that a model could learn to stop by.

    Raises:
        DataError: if the tokenizer has none, or one that does not take plain text, or is not a fast one.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise DataError(
                f"{self.name}: no chat template; choose an instruct model, or a tokenizer with a chat template"
            )
        if not tokenizer.is_fast:
            raise DataError(f"{self.name}: not a fast tokenizer; choose a model that has a tokenizer.json")
        self._template = on_one_day(default_template(tokenizer) or "")
        self._says_itself = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self._template))
        self._prompts, self._end = self._try_out()
        self.ends_turns = self._end != ""

    def render(self, conversation: Sequence[Message], tools: Sequence[Tool] = (), **options: Any) -> Any:
        """Return the conversation as text; `options` go to transformers' `apply_chat_template`.

        Raises:
            TemplateRefusal: if the template refuses the conversation.
        """
        if not is_plain(conversation, tools):
            conversation = [self._style.shape(message) for message in conversation]
        return self._render(conversation, tools, **options)

    def render_example(self, example: Example) -> str:
        """Return a conversation up to its last learned answer as text.

        Raises:
            TemplateRefusal: if the template refuses the conversation, or leaves out a part of it.
        """
        conversation = example.messages[: example.last_answer + 1]
        if not is_plain(conversation, example.tools) and (part := self._style.missing(conversation, example.tools)):
            raise TemplateRefusal(
                f"{self.name}: its chat template does not write {part}, which the conversation has that begins "
                f"{shorten(conversation[0]['content'])!r}; change the conversation, or choose another model"
            )
        return self.render(conversation, example.tools)

    def check(self, example: Example) -> None:
        """Raise BadRow if the template refuses an example."""
        try:
            for alternative in example.alternatives:
                self.render_example(alternative)
        except TemplateRefusal as refusal:
            raise BadRow(str(refusal)) from None

    def learned_spans(self, example: Example, text: str, loss_on: str) -> list[Span]:
        """Return the places that the loss is taken on.

        Args:
            text: the example, rendered.
            loss_on: "assistant" or "auto" (every answer), "completion" (the last one), or "all" (everything).

        Raises:
            DataError: if the template does not let answers be told from the rest.
        """
        conversation = example.messages[: example.last_answer + 1]
        if loss_on != "all":
            answers = self.answers(conversation, text, example.tools)
            return answers[-1:] if loss_on == "completion" else answers
        if all("weight" not in message for message in conversation):
            return [(0, len(text))]
        left_out = [span for span, is_kept in self._answers(conversation, text, example.tools) if not is_kept]
        borders = [0, *(border for span in left_out for border in span), len(text)]
        return list(zip(borders[::2], borders[1::2], strict=True))

    def answers(self, conversation: Sequence[Message], text: str, tools: Sequence[Tool] = ()) -> list[Span]:
        """Return the places of the learned answers, each with its end of turn.

        Args:
            conversation: messages, the last of them an answer.
            text: the same, rendered.

        Raises:
            DataError: if the template does not let answers be told from the rest.
        """
        spans = [span for span, is_kept in self._answers(conversation, text, tools) if is_kept]
        if not spans:
            raise self._unmarkable()
        return spans

    def _answers(self, conversation: Sequence[Message], text: str, tools: Sequence[Tool]) -> list[tuple[Span, bool]]:
        """Return the places of all answers, and whether they are learned."""
        find = self._marked if self._says_itself else self._probed
        found = find(conversation, text, tools)
        if not found:
            raise self._unmarkable()
        last = text[found[-1][0][1] :].rstrip()
        # Behind the last answer there may be an end of text too, behind the others only the end of turn.
        ends_of_turn = [last, "".join(re.findall(r"^\s*\S+", last))]
        if any("tool_calls" in message for message in conversation):  # a call may end in another way
            ends_of_turn.append(self._end or "")
        complete = []
        for (start, end), is_kept in found:
            end += next((len(e) for e in ends_of_turn if e and text.startswith(e, end)), 0)
            complete.append(((start, start + len(text[start:end].rstrip())), is_kept))
        return complete

    def end_of_turn(self) -> int | None:
        """Return the token that ends an answer, which training teaches; None if plain text ends it."""
        if not self.ends_turns:
            return self.tokenizer.eos_token_id
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
        try:
            text = self.render([question, answer])
        except DataError:  # a template that wants something else first
            return None
        behind = self.tokenizer(text.rpartition(PROBE)[2].lstrip(), add_special_tokens=False)["input_ids"]
        return behind[0] if behind and behind[0] in self.tokenizer.added_tokens_decoder else None

    def _marked(self, conversation: Sequence[Message], text: str, tools: Sequence[Tool]) -> list[tuple[Span, bool]]:
        """Return the runs of tokens that the template's own `{% generation %}` marks."""
        output = self.render(
            conversation,
            tools,
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
        kept = [is_learned(message) for message in conversation if message["role"] == "assistant"]
        if all(kept):
            return [(span, True) for span in spans]
        if len(kept) != len(spans):  # it cannot be told which run is which answer
            raise self._unmarkable()
        return list(zip(spans, kept, strict=True))

    def _probed(self, conversation: Sequence[Message], text: str, tools: Sequence[Tool]) -> list[tuple[Span, bool]]:
        """Return the place of every answer that the template shows."""
        probe = PROBE
        while probe in text:
            probe += "x"
        found = []
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            around = self._around(conversation, i, tools, probe)
            if around is None and "tool_calls" not in message:
                continue  # a turn that this template leaves out
            before, after = around or (None, None)
            end = self._end_of_calls(conversation[: i + 1], text, tools) if "tool_calls" in message else None
            if end is None and after is not None and text.endswith(after):
                end = min(len(text) - len(after), self._next_result(conversation, i, text, tools, probe))
            start = self._start(conversation[:i], before, text, tools)
            if start is None or end is None or start > end:
                raise self._unmarkable()
            found.append(((start, end), is_learned(message)))
        return found

    def _around(
        self, conversation: Sequence[Message], i: int, tools: Sequence[Tool], probe: str
    ) -> tuple[str, str] | None:
        """Return the text before and behind answer `i`, found with a probe in its place; None if it is not shown.

        Instead of a call of a tool there is a plain answer, since a template may write no text beside a call.
        """
        thought = probe[::-1]
        plain = {"role": "assistant", "content": probe}
        plain |= {"reasoning_content": thought} if "reasoning_content" in conversation[i] else {}
        try:
            probed = self.render([*conversation[:i], plain, *conversation[i + 1 :]], tools)
        except TemplateRefusal:
            if "tool_calls" in conversation[i]:  # what a tool answers must follow a call
                return None
            raise
        if probe not in probed:
            return None
        before, _, after = probed.partition(probe)
        if probe in after:
            raise self._unmarkable()
        return before.partition(thought)[0], after

    def _end_of_calls(self, conversation: Sequence[Message], text: str, tools: Sequence[Tool]) -> int | None:
        """Return the end of a turn with calls of tools: there the text of what came so far ends."""
        for shown in _with_and_without_reasoning(conversation):
            so_far = self.render(shown, tools).rstrip()
            if text.startswith(so_far):
                return len(so_far)
        return None

    def _next_result(
        self, conversation: Sequence[Message], i: int, text: str, tools: Sequence[Tool], probe: str
    ) -> int:
        """Return the place in `text` of what a tool answered to message `i`; the end of the text if no tool did."""
        if "tool_calls" not in conversation[i] or i + 1 == len(conversation) or conversation[i + 1]["role"] != "tool":
            return len(text)
        answered = {**conversation[i + 1], "content": probe}
        before, found, _ = self.render([*conversation[: i + 1], answered, *conversation[i + 2 :]], tools).partition(
            probe
        )
        return len(before) if found else len(text)

    def _start(self, earlier: Sequence[Message], before: str | None, text: str, tools: Sequence[Tool]) -> int | None:
        """Return where in `text` the answer after `earlier` begins; the probe had `before` in front of it."""
        for shown in _with_and_without_reasoning(earlier) if self._prompts and earlier else ():
            try:
                prompt = self.render(shown, tools, add_generation_prompt=True)
                bare = self.render(shown, tools)
            except DataError:  # some templates want every conversation complete
                prompt = bare = before
            if prompt is not None and text.startswith(prompt):
                return len(prompt)
            if before is not None and text.startswith(bare):
                # Thinking in the answer stands where the prompt has an empty one.
                return len(os.path.commonprefix([before, text]))
        return len(before) if before is not None and text.startswith(before) else None

    def _render(self, conversation: Sequence[Message], tools: Sequence[Tool] = (), **options: Any) -> Any:
        """Return messages as text, in the shape in which the template takes them."""
        try:
            options = {"chat_template": self._template, "tokenize": False, **options}
            return self.tokenizer.apply_chat_template(list(conversation), tools=list(tools) or None, **options)
        except Exception as error:  # a template is a program from anywhere, and divides by nothing if it likes
            raise TemplateRefusal(
                f"{self.name}: its chat template refuses the conversation that begins "
                f"{shorten(conversation[0]['content'])!r}: {shorten(str(error), 120)}; "
                "change the conversation, or choose another model"
            ) from None

    @cached_property
    def _style(self) -> Style:
        """Return the shape in which the template takes calls of tools and reasoning."""
        return find_style(self._render)

    def _try_out(self) -> tuple[bool, str | None]:
        """Return whether there is a generation prompt, and the end of an answer; None if it does not show."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
        try:
            prompts = self.render([question], add_generation_prompt=True) != self.render([question])
            text = self.render([question, answer])
        except DataError:  # a template that wants something else first; its own conversations will tell
            return False, None
        if PROBE not in text:
            raise DataError(f"{self.name}: its chat template does not take plain text; choose another model")
        return prompts, text.rpartition(PROBE)[2].strip()

    def _unmarkable(self) -> DataError:
        return DataError(f"{self.name}: its chat template does not tell answers from the rest; set train.loss_on: all")


def _with_and_without_reasoning(conversation: Sequence[Message]) -> list[list[Message]]:
    """Return the conversation, and without its reasoning: templates leave it out of a turn in the middle."""
    without = [{key: value for key, value in m.items() if key != "reasoning_content"} for m in conversation]
    return [list(conversation)] if without == list(conversation) else [list(conversation), without]
