"""The texts that a chat template puts around each turn of a conversation.

They are found by rendering probes. Then other conversations are put together from them and compared with the
template's own rendering. The comparison fails if the template does anything else, such as telling the date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Conversation = list[dict[str, str]]
Render = Callable[[Conversation, bool], str]  # a conversation, with the beginning of an answer or not -> text

_SYSTEM, _FIRST, _ANSWER, _SECOND = (f"tunepress{word}probe" for word in ("system", "first", "answer", "second"))
_DAYS = (datetime(2026, 1, 1), datetime(2031, 12, 30))


@dataclass(frozen=True)
class Turns:
    """The texts that a chat template writes around turns.

    Attributes:
        begin: before the first turn.
        around: role -> text before and after each of its turns.
        between: between two turns, in addition.
        answer: after the last turn, at the beginning of an answer.
        inside: True if the system's turn is a part of the user's first one.
        default: the system's text in a conversation without one.
    """

    begin: str
    around: Mapping[str, tuple[str, str]]
    between: str
    answer: str
    inside: bool = False
    default: str | None = None

    def put_together(self, conversation: Conversation) -> str:
        """Return a conversation that ends with a question, as the template renders it."""
        if self.default is not None and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": self.default}, *conversation]
        if self.inside and conversation[0]["role"] == "system":
            (system, user, *rest), (before, behind) = conversation, self.around["system"]
            text = f"{before}{system['content']}{behind}{user['content']}"
            conversation = [{**user, "content": text}, *rest]
        told = (turn["content"].join(self.around[turn["role"]]) for turn in conversation)
        return self.begin + self.between.join(told) + self.answer


def find_turns(template: str, tokens: Mapping[str, str], first: str = "") -> Turns | None:
    """Return the texts that a Jinja chat template writes around turns; None if it does anything else.

    Args:
        tokens: the special tokens that it may write, such as `bos_token`.
        first: the text that is put before every prompt, so that the template's own copy is removed.
    """
    renders = [_renderer(template, tokens, first, day) for day in _DAYS]
    try:
        found = _derive(renders[0])
        is_so = all(found.put_together(c) == render(c, True) for render in renders for c in _conversations())
    except Exception:  # a template may refuse a conversation in any way
        return None
    return found if is_so else None


def _renderer(template: str, tokens: Mapping[str, str], first: str, day: datetime) -> Render:
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = {**tokens, "strftime_now": day.strftime}

    def render(conversation: Conversation, asks: bool) -> str:
        made: Any = render_jinja_template([conversation], chat_template=template, add_generation_prompt=asks, **given)
        return made[0][0].removeprefix(first)  # the library says str, and returns the texts and their masks

    return render


def _derive(render: Render) -> Turns:
    """Return the texts that `render` writes around probes.

    Raises:
        ValueError: if it does not show each probe exactly once.
    """
    user, answered = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}
    alone = render([user], False)
    head, user_behind = _cut(alone, _FIRST)
    answer = render([user], True).removeprefix(alone)
    _, answer_behind = _cut(render([user, answered], False), _ANSWER)
    talk = render([user, answered, {"role": "user", "content": _SECOND}], True)
    _, to_answer, to_user, _ = _cut(talk, _FIRST, _ANSWER, _SECOND)
    user_before = to_user.removeprefix(answer_behind)
    between = user_before.removesuffix(head) if len(head) < len(user_before) else ""
    user_before = user_before.removeprefix(between)
    begin = head.removesuffix(user_before)
    around = {"user": (user_before, user_behind)}
    around["assistant"] = (to_answer.removeprefix(user_behind).removeprefix(between), answer_behind)

    system_before, system_behind, _ = _cut(
        render([{"role": "system", "content": _SYSTEM}, user], False), _SYSTEM, _FIRST
    )
    if not system_behind.endswith(between + user_before):
        if between:
            raise ValueError("the system's turn is in the user's, and there is text between turns")
        around["system"] = (system_before.removeprefix(begin + user_before), system_behind)
        return Turns(begin, around, between, answer, inside=True)
    system_behind = system_behind.removesuffix(between + user_before)
    if system_before.startswith(begin):
        around["system"] = (system_before.removeprefix(begin), system_behind)
        return Turns(begin, around, between, answer)
    around["system"] = (system_before, system_behind)
    default = begin.removeprefix(system_before).removesuffix(system_behind + between)
    return Turns("", around, between, answer, default=default)


def _cut(text: str, *probes: str) -> list[str]:
    """Return the texts before, between and after the probes."""
    parts = []
    for probe in probes:
        part, found, text = text.partition(probe)
        if not found or probe in text:
            raise ValueError(f"{probe}: not exactly once in the text")
        parts.append(part)
    return [*parts, text]


def _conversations() -> list[Conversation]:
    """Return conversations of one to three questions, with and without a system's turn."""
    said = ("What is 2 + 2?", "Four.", 'And *why*?\n\nSay it in "two" lines.', "It is\nso.", "<b>Tschüß</b> {{ x }}")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    talks = [turns[:count] for count in (1, 3, 5)]
    return [c for talk in talks for c in (talk, [{"role": "system", "content": "Be brief.\nBe kind."}, *talk])]
