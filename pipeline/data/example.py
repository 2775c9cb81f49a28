"""One thing to learn: a conversation, a text, or a conversation with a better and a worse last answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.data.messages import Message
from pipeline.data.tools import Tool


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation with at least one message by the assistant, or a plain text.

    Attributes:
        messages: `role` and `content` each, and sometimes more (`pipeline.data.messages`); empty for a text.
        text: None for a conversation.
        tools: the tools that the assistant may call, as chat templates take them.
        rejected: of a preference pair, the worse answer; the last of `messages` is the better one. Else None.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Tool, ...] = ()
    rejected: Message | None = field(default=None, repr=False)  # calibration counts the characters of the repr

    @property
    def alternatives(self) -> tuple[Example, ...]:
        """Return the conversations of a preference pair, the better one first; else the example alone."""
        if self.rejected is None:
            return (self,)
        return tuple(
            Example((*self.messages[:-1], last), tools=self.tools) for last in (self.messages[-1], self.rejected)
        )

    @property
    def last_answer(self) -> int:
        """Return the index of the last message by the assistant that is learned."""
        return max(i for i, message in enumerate(self.messages) if is_learned(message))

    def canonical(self) -> str:
        """Return the same text for the same example, whatever the file looked like."""
        if self.text is not None:
            return _canonical({"text": self.text})
        if self.rejected is None:
            return self._told(self.messages)
        pair = {"messages": self.messages, "rejected": self.rejected}
        return _canonical(pair | ({"tools": self.tools} if self.tools else {}))

    def answers(self, loss_on: str = "auto") -> list[int]:
        """Return the indexes of the messages that are learned; `loss_on` as in `train.loss_on`.

        Of a preference pair only the last answer is learned, in its two versions.
        """
        found = [i for i, message in enumerate(self.messages) if is_learned(message)]
        return found[-1:] if loss_on == "completion" or self.rejected is not None else found

    def prompt(self, loss_on: str = "auto") -> str:
        """Return everything before the first learned answer in canonical form; a text is its own prompt.

        A greeting before the first question is no answer to anything, so it belongs to the prompt.
        """
        return self.prompts(loss_on)[0]

    def prompts(self, loss_on: str = "auto") -> list[str]:
        """Return everything before each learned answer in canonical form; a text is its own prompt."""
        if self.text is not None:
            return [self.canonical()]
        return [self._told(map(_read, self.messages[:i])) for i in self._replies(loss_on)]

    def contexts(self, loss_on: str = "auto") -> list[bytes]:
        """Return a digest of everything before each learned answer; of a text, that of the text."""
        beginnings = self._beginnings()
        return [beginnings[i] for i in self._replies(loss_on)] if self.text is None else beginnings

    def learned_in_context(self, loss_on: str = "auto") -> list[bytes]:
        """Return a digest of each learned answer with everything before it; of a text, that of the text."""
        beginnings = self._beginnings()
        return [beginnings[i + 1] for i in self.answers(loss_on)] if self.text is None else beginnings

    def _beginnings(self) -> list[bytes]:
        """Return the digests of the first 0, 1, 2, ... messages; of a text, its one digest."""
        so_far = hashlib.blake2b(digest_size=16)
        if self.text is not None or self.tools:
            so_far.update((self.canonical() if self.text is not None else _canonical(self.tools)).encode())
        digests = [so_far.digest()]
        for message in map(_read, self.messages):
            so_far.update(_canonical(message).encode() + b"\n")
            digests.append(so_far.digest())
        return digests

    def _replies(self, loss_on: str) -> list[int]:
        """Return the learned answers without greetings, or the first one if all are greetings."""
        asked = next((i for i, message in enumerate(self.messages) if message["role"] in ("user", "tool")), 0)
        answers = self.answers(loss_on)
        return [i for i in answers if i > asked] or answers[:1]

    def learned(self) -> list[str]:
        """Return what is to be learned: the answers with their calls of tools, or the text.

        Of a preference pair it is the better answer.
        """
        return [_said(self.messages[i]) for i in self.answers()] if self.text is None else [self.text]

    def _told(self, messages: Iterable[Message]) -> str:
        """Return messages in canonical form, with the tools if there are some."""
        messages = list(messages)
        return _canonical({"messages": messages, "tools": self.tools} if self.tools else messages)


def is_learned(message: Message) -> bool:
    """Return True if a message is an answer that is learned."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _read(message: Message) -> Message:
    """Return a message as the model reads it: whether it is learned does not show."""
    return {key: value for key, value in message.items() if key != "weight"}


def _said(message: Message) -> str:
    calls = [_canonical(call["function"]) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in (message.get("reasoning_content"), message["content"], *calls) if part)


_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
