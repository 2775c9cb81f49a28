"""The chat template that a base model gets if it has none."""

from __future__ import annotations

from typing import Any

from pipeline.errors import DataError

# Turns as they stand in plain text, so that a model that knows no turns needs no new tokens for them. The answer
# begins on a line of its own and is ended by the tokenizer's own end of text, which every model can stop by.
_SUPPLIED = (
    "BEGINNING{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)


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
    """Return True if a tokenizer's chat template is the one of `supply_template`, with or without a system prompt."""
    return bool(tokenizer.eos_token) and str(tokenizer.chat_template).endswith(_template_for(tokenizer))


def beginning(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token in a list if this tokenizer puts it before text, else an empty list."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first == [tokenizer.bos_token_id] else []


def _template_for(tokenizer: Any) -> str:
    return _SUPPLIED.replace("BEGINNING", "{{ bos_token }}" if beginning(tokenizer) else "")
