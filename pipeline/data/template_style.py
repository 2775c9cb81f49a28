"""The shape in which a chat template takes calls of tools and reasoning, and what it leaves out: found by trying.

Templates differ: some write the arguments of a call as JSON, others join them as text; some read `reasoning_content`,
others `thinking`. And some write a conversation without its tools, although they do not refuse it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.data.messages import Message
from pipeline.data.tools import Tool
from pipeline.errors import DataError

PROBE = "tunepressprobe"
_DAY = datetime(2026, 1, 1)
_ARGUMENT = "tunepressargument"
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Render = Callable[[list[Message], Sequence[Tool]], str]  # of messages as the template gets them; raises DataError

_QUESTION = {"role": "user", "content": "?"}
_ANSWER = {"role": "assistant", "content": "."}
_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE,
        "description": "?",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "?"}}},
    },
}
_ID = "tunepress"  # nine letters, as Mistral's templates want


@dataclass(frozen=True)
class Style:
    """The shape in which a template takes messages.

    Attributes:
        reasoning_key: the key of an answer's reasoning.
        arguments_as_text: whether arguments are JSON text, not an object.
        no_content: the content of a call without text: "" or None.
        left_out: parts of a conversation that the template does not write.
    """

    reasoning_key: str
    arguments_as_text: bool
    no_content: str | None
    left_out: frozenset[str]

    def shape(self, message: Message) -> Message:
        """Return a message as the template takes it."""
        shaped = {key: value for key, value in message.items() if key != "weight"}
        if "reasoning_content" in message:
            shaped[self.reasoning_key] = shaped.pop("reasoning_content")
        if "tool_calls" in message:
            shaped["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            shaped["content"] = message["content"] or self.no_content
        return shaped

    def missing(self, conversation: Sequence[Message], tools: Sequence[Tool]) -> str | None:
        """Return a part of the conversation that the template leaves out, or None."""
        return next((part for part in _parts(conversation, tools) if part in self.left_out), None)

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        if not self.arguments_as_text:
            return call
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": arguments}}


_TOOLS, _CALLS, _TEXT_BESIDE_CALLS = "tools", "calls of tools", "the text beside calls of tools"
_RESULTS, _SYSTEM, _REASONING = "what tools answered", "system messages", "reasoning"


def is_plain(conversation: Sequence[Message], tools: Sequence[Tool]) -> bool:
    """Return True if every template writes all parts of the conversation, so that there is nothing to try."""
    return not _parts(conversation, tools) and all(message.keys() <= {"role", "content"} for message in conversation)


def _parts(conversation: Sequence[Message], tools: Sequence[Tool]) -> list[str]:
    """Return the parts of the conversation that a template may leave out."""
    found = [_TOOLS] if tools else []
    for message in conversation:
        found += [_SYSTEM] if message["role"] == "system" else []
        found += [_RESULTS] if message["role"] == "tool" else []
        found += [_REASONING] if "reasoning_content" in message else []
        if "tool_calls" in message:
            found += [_CALLS, *([_TEXT_BESIDE_CALLS] if message["content"] else [])]
    return found


def find_style(render: Render) -> Style:
    """Return the style of a template."""

    def written(conversation: list[Message], tools: Sequence[Tool] = ()) -> str | None:
        try:
            return render(conversation, tools)
        except DataError:  # it wants something else; the conversations of the data will tell
            return None

    def leaves_out(conversation: list[Message], tools: Sequence[Tool] = ()) -> bool:
        text = written(conversation, tools)
        return text is not None and PROBE not in text

    keys = [key for key in _REASONING_KEYS if PROBE in (written([_QUESTION, _ANSWER | {key: PROBE}]) or "")]
    shapes = itertools.product((False, True), ("", None))
    texts = {shape: written([_QUESTION, _call(*shape)]) for shape in shapes}
    good = [shape for shape, text in texts.items() if text is not None and _is_whole(text)]
    as_text, no_content = (good or [(False, "")])[0]
    call = _call(as_text, no_content, name="f")
    result = {"role": "tool", "content": PROBE, "name": "f", "tool_call_id": _ID}
    left_out = {
        _TOOLS: leaves_out([_QUESTION, _ANSWER], [_TOOL]),
        _CALLS: not good and any(text is not None for text in texts.values()),
        _TEXT_BESIDE_CALLS: leaves_out([_QUESTION, call | {"content": PROBE}]),
        _RESULTS: leaves_out([_QUESTION, call, result, _ANSWER]),
        _SYSTEM: leaves_out([{"role": "system", "content": PROBE}, _QUESTION, _ANSWER]),
        _REASONING: not keys,
    }
    return Style(
        reasoning_key=(keys or _REASONING_KEYS)[0],
        arguments_as_text=as_text,
        no_content=no_content,
        left_out=frozenset(part for part, is_left_out in left_out.items() if is_left_out),
    )


def _call(as_text: bool, no_content: str | None, name: str = PROBE) -> Message:
    arguments = json.dumps({_ARGUMENT: "a"}) if as_text else {_ARGUMENT: "a"}
    function = {"name": name, "arguments": arguments}
    call = {"type": "function", "id": _ID, "function": function}
    return {"role": "assistant", "content": no_content, "tool_calls": [call]}


def _is_whole(text: str) -> bool:
    """Return True if a text has the call, and not its arguments as Python writes them or as JSON within JSON."""
    return PROBE in text and _ARGUMENT in text and f"'{_ARGUMENT}'" not in text and f'\\"{_ARGUMENT}' not in text


def without_marks(template: str) -> str:
    """Return the template without the tags that mark answers for training, which write nothing."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def on_one_day(template: str) -> str:
    """Return the template with a fixed date if it asks for today's, as those of Llama 3.2 and SmolLM3 do.

    The same data must give the same tokens tomorrow. Otherwise a resumed run would train on another text, and a second
    measurement would compare another text.
    """
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda call: repr(_DAY.strftime(call[2])), template)
