"""The text that a chat template makes of a conversation, and the places of the answers in it.

Where they are is found out from the template itself, in one of two ways:

- A template with `{% generation %}` says it.
- Otherwise each answer is replaced by a probe. What the two renderings have in common
  behind the probe is behind the answer; the answer begins where the generation prompt
  ends, for that is what a model is given when it has to answer. Templates that strip
  earlier turns, add a thinking block, or trim the content are marked right that way.

The end-of-turn token after an answer belongs to it, since a model that never sees it
never stops; the white space after that token does not.
"""

from __future__ import annotations

import os
import re
from datetime import datetime
from typing import Any

from pipeline.data.rows import shorten
from pipeline.errors import DataError

_PROBE = "tunepressprobe"
_DAY = datetime(2026, 1, 1)

# Turns as they stand in plain text, so that a model that knows no turns needs no new tokens for them. The answer
# begins on a line of its own and is ended by the tokenizer's own end of text, which every model can stop by.
_SUPPLIED = (
    "BEGINNING{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)

Message = dict[str, str]
Span = tuple[int, int]  # [from, to) in characters of the rendered conversation


def supply_template(tokenizer: Any) -> bool:
    """Give a tokenizer a chat template if it has none: turns marked in plain text, without new tokens.

    The template depends on nothing but the tokenizer, so that every stage of a run supplies the same one; it goes
    where the tokenizer is saved.

    Returns:
        Whether it did.

    Raises:
        DataError: if the tokenizer has no end-of-text token, by which an answer could end.
    """
    if tokenizer.chat_template:
        return False
    if tokenizer.eos_token is None:
        name = tokenizer.name_or_path or "the tokenizer"
        raise DataError(
            f"{name}: neither a chat template nor an end-of-text token, so a model could not learn to stop; "
            "choose another model, or data of plain text"
        )
    tokenizer.chat_template = _template_for(tokenizer)
    return True


def is_supplied(tokenizer: Any) -> bool:
    """Return True if a tokenizer's chat template is the one of `supply_template`."""
    return bool(tokenizer.eos_token) and tokenizer.chat_template == _template_for(tokenizer)


def beginning(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token in a list if this tokenizer puts it before text, else an empty list."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first == [tokenizer.bos_token_id] else []


def _template_for(tokenizer: Any) -> str:
    return _SUPPLIED.replace("BEGINNING", "{{ bos_token }}" if beginning(tokenizer) else "")


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
        self._template = on_one_day(tokenizer.get_chat_template())
        self._says_itself = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self._template))
        self._prompts, self.ends_turns = self._try_out()

    def render(self, conversation: list[Message], **options: Any) -> Any:
        """Return the conversation as text; `options` go to transformers' `apply_chat_template`.

        Raises:
            DataError: if the template refuses the conversation.
        """
        try:
            options = {"chat_template": self._template, "tokenize": False, **options}
            return self.tokenizer.apply_chat_template(conversation, **options)
        except Exception as error:  # a template is a program from anywhere, and divides by nothing if it likes
            raise DataError(
                f"{self.name}: its chat template refuses the conversation that begins "
                f"{shorten(conversation[0]['content'])!r}: {shorten(str(error), 120)}; "
                "change the conversation, or choose another model"
            ) from None

    def answers(self, conversation: list[Message], text: str) -> list[Span]:
        """Return the places of the answers, each with its end of turn.

        Args:
            conversation: messages, the last of them an answer.
            text: the same, rendered.

        Raises:
            DataError: if the template does not let answers be told from the rest.
        """
        spans = self._marked(conversation) if self._says_itself else self._probed(conversation, text)
        if not spans:
            raise self._unmarkable()
        last = text[spans[-1][1] :].rstrip()
        # Behind the last answer there may be an end of text too, behind the others only the end of turn.
        ends_of_turn = (last, "".join(re.findall(r"^\s*\S+", last)))
        complete = []
        for start, end in spans:
            end += next((len(e) for e in ends_of_turn if text.startswith(e, end)), 0)
            complete.append((start, start + len(text[start:end].rstrip())))
        return complete

    def end_of_turn(self) -> int | None:
        """Return the token that ends an answer, which training teaches; None if plain text ends it."""
        if not self.ends_turns:
            return self.tokenizer.eos_token_id
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        try:
            text = self.render([question, answer])
        except DataError:  # a template that wants something else first
            return None
        behind = self.tokenizer(text.rpartition(_PROBE)[2].lstrip(), add_special_tokens=False)["input_ids"]
        return behind[0] if behind and behind[0] in self.tokenizer.added_tokens_decoder else None

    def _marked(self, conversation: list[Message]) -> list[Span]:
        """Return the runs of tokens that the template's own `{% generation %}` marks."""
        output = self.render(
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

    def _probed(self, conversation: list[Message], text: str) -> list[Span]:
        """Return the place of every answer that the template shows."""
        probe = _PROBE
        while probe in text:
            probe += "x"
        spans = []
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            probed = self.render([*conversation[:i], {**message, "content": probe}, *conversation[i + 1 :]])
            if probe not in probed:
                continue  # a turn that this template leaves out
            before, _, after = probed.partition(probe)
            start, end = self._start(conversation[:i], before, text), len(text) - len(after)
            if start is None or start > end or not text.endswith(after) or probe in after:
                raise self._unmarkable()
            spans.append((start, end))
        return spans

    def _start(self, earlier: list[Message], before: str, text: str) -> int | None:
        """Return where in `text` the answer after `earlier` begins; the probe had `before` in front of it."""
        if self._prompts and earlier:
            try:
                prompt, bare = self.render(earlier, add_generation_prompt=True), self.render(earlier)
            except DataError:  # some templates want every conversation complete
                prompt = bare = before
            if text.startswith(prompt):
                return len(prompt)
            if text.startswith(bare):  # thinking in the answer stands where the prompt has an empty one
                return len(os.path.commonprefix([before, text]))
        return len(before) if text.startswith(before) else None

    def _try_out(self) -> tuple[bool, bool]:
        """Return whether there is a generation prompt, and whether answers have an end; some templates have neither."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        try:
            prompts = self.render([question], add_generation_prompt=True) != self.render([question])
            text = self.render([question, answer])
        except DataError:  # a template that wants something else first; its own conversations will tell
            return False, True
        if _PROBE not in text:
            raise DataError(f"{self.name}: its chat template does not take plain text; choose another model")
        return prompts, not text.rstrip().endswith(_PROBE)

    def _unmarkable(self) -> DataError:
        return DataError(f"{self.name}: its chat template does not tell answers from the rest; set train.loss_on: all")


def on_one_day(template: str) -> str:
    """Return the template with a fixed date if it asks for today's, as those of Llama 3.2 and SmolLM3 do.

    The same data must give the same tokens tomorrow. Otherwise a resumed run would train on another text, and a second
    measurement would compare another text.
    """
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda call: repr(_DAY.strftime(call[2])), template)
