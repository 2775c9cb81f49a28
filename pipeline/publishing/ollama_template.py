"""What a chat template puts around each turn of a conversation, where that is all that it does.

It is found by rendering probes, and proven by putting other conversations together from it: of a template
that does anything else, such as telling the date, that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

Conversation = list[dict[str, str]]
Render = Callable[[Conversation, bool], str]  # a conversation, with the beginning of an answer or not -> text

_SYSTEM, _FIRST, _ANSWER, _SECOND = (f"tunepress{word}probe" for word in ("system", "first", "answer", "second"))
_DAYS = (datetime(2026, 1, 1), datetime(2031, 12, 30))


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around turns, in the order in which it stands.

    Attributes:
        begin: before the first turn.
        around: role -> before and behind its text.
        between: between two turns, besides.
        answer: behind the last turn, where an answer begins.
        inside: is the system's turn a part of the user's first one, between what is before it and its text?
        default: what the system says where a conversation does not tell.
    """

    begin: str
    around: Mapping[str, tuple[str, str]]
    between: str
    answer: str
    inside: bool = False
    default: str | None = None

    def put_together(self, conversation: Conversation) -> str:
        """A conversation that ends with a question, as the template renders it."""
        if self.default is not None and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": self.default}, *conversation]
        if self.inside and conversation[0]["role"] == "system":
            (system, user, *rest), (before, behind) = conversation, self.around["system"]
            text = f"{before}{system['content']}{behind}{user['content']}"
            conversation = [{**user, "content": text}, *rest]
        told = (turn["content"].join(self.around[turn["role"]]) for turn in conversation)
        return self.begin + self.between.join(told) + self.answer


def find_turns(template: str, tokens: Mapping[str, str], first: str = "") -> Turns | None:
    """What a chat template in Jinja writes around turns; None where that is not all that it does.

    Args:
        tokens: the special tokens that it may write, such as `bos_token`.
        first: with what every text begins that is given to the model; the template's own is taken off.
    """
    renders = [_renderer(template, tokens, first, day) for day in _DAYS]
    try:
        found = _derive(renders[0])
        is_so = all(found.put_together(c) == render(c, True) for render in renders for c in _conversations())
    except Exception:  # of a template, which may refuse a conversation in any way, or leave out what was said
        return None
    return found if is_so else None


def _renderer(template: str, tokens: Mapping[str, str], first: str, day: datetime) -> Render:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {**tokens, "strftime_now": lambda form: day.strftime(form)}

    def render(conversation: Conversation, asks: bool) -> str:
        (text,), _ = render_jinja_template([conversation], chat_template=template, add_generation_prompt=asks, **given)
        return text.removeprefix(first)

    return render


def _derive(render: Render) -> Turns:
    """What `render` writes around probes, as if it were the same around everything.

    Raises:
        ValueError: where it does not show each of them once.
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
            raise ValueError("a system's turn in the user's, and something between turns")
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
    """What stands before, between and behind the probes."""
    parts = []
    for probe in probes:
        part, found, text = text.partition(probe)
        if not found or probe in text:
            raise ValueError(f"{probe} is not there once")
        parts.append(part)
    return [*parts, text]


def _conversations() -> list[Conversation]:
    """Some of one to three questions, with and without a system's turn."""
    said = ("What is 2 + 2?", "Four.", 'And *why*?\n\nSay it in "two" lines.', "It is\nso.", "<b>Tschüß</b> {{ x }}")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    talks = [turns[:count] for count in (1, 3, 5)]
    return [c for talk in talks for c in (talk, [{"role": "system", "content": "Be brief.\nBe kind."}, *talk])]
