"""The system prompt of conversations that have none: what a chat template adds by itself, and how to set another.

Many templates add a sentence such as "You are a helpful assistant named ...". It is then trained in and published with
the model, although nobody asked for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.data.example import Example
from pipeline.data.template_choice import default_template
from pipeline.data.template_style import PROBE, on_one_day, without_marks
from pipeline.errors import DataError

# The line break at its end is removed by every engine of these templates, so that the rest is as before.
_FIRST = (
    "{%% if not messages or messages[0]['role'] not in ['system', 'developer'] %%}"
    "{%% set messages = [{'role': 'system', 'content': %s}] + messages %%}{%% endif %%}\n"
)
_QUESTION = {"role": "user", "content": "tunepressquestion"}


def added_prompt(tokenizer: Any) -> str:
    """Return the system prompt that the tokenizer's chat template adds to a conversation without one.

    A preamble that it also writes before another system prompt, such as a date, is not a part of it.

    Returns:
        An empty text if the template adds none, or takes no system prompt.
    """
    template = on_one_day(default_template(tokenizer) or "")
    return _added_by(lambda messages: tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))


def prompt_in(template: str) -> str:
    """Return what `added_prompt` does, for the text of a chat template, without a tokenizer and transformers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "bos_token": "", "eos_token": ""}
    plain = without_marks(on_one_day(template))
    return _added_by(lambda messages: environment.from_string(plain).render(messages=messages))


def _added_by(render: Callable[[list[dict[str, str]]], str]) -> str:
    try:
        without, given = render([_QUESTION]), render([{"role": "system", "content": PROBE}, _QUESTION])
    except Exception:  # a template may refuse a conversation in any way
        return ""
    before, found, behind = given.partition(PROBE)
    if not found or not without.startswith(before) or not without.removeprefix(before).endswith(behind):
        return ""
    return without.removeprefix(before).removesuffix(behind).strip()


def set_prompt(tokenizer: Any, prompt: str) -> str:
    """Let the tokenizer's chat template add this system prompt, in training and wherever the model is used.

    Args:
        prompt: the text; empty for none.

    Returns:
        The template, which is the tokenizer's own from now on.

    Raises:
        DataError: if the template does not take it.
    """
    template = default_template(tokenizer) or ""
    if added_prompt(tokenizer) != prompt.strip():
        template = _FIRST % json.dumps(prompt, ensure_ascii=False) + template
    tokenizer.chat_template = template
    if (found := added_prompt(tokenizer)) != prompt.strip():
        name = tokenizer.name_or_path or "the model"
        instead = f"it writes {found!r}" if found else "it takes no system prompt"
        raise DataError(
            f"data.system {prompt!r}: not possible with the chat template of {name}, for {instead}. "
            "Try: remove data.system, or set data.chat_template"
        )
    return template


def without_prompt(examples: tuple[Example, ...]) -> int:
    """Return the number of conversations that have no system prompt."""
    return sum(bool(e.messages) and e.messages[0]["role"] != "system" for e in examples)


def describe_prompt(prompt: str, is_chosen: bool, count: int | None, total: int | None) -> str:
    """Return the line that tells people which system prompt is trained in.

    Args:
        prompt: what the chat template adds.
        is_chosen: True if the configuration asks for it.
        count, total: number of examples without a system prompt, and of all; None if not known.
    """
    which = f"{count:,} of {total:,} examples have none" if count and total else "examples may have none"
    if is_chosen:
        return f"{which}, and get that of data.system: {prompt!r}"
    return (
        f"{which}, and the chat template gives them {prompt!r}. It is trained in and published. "
        "Try: data.system with another text, or '' for none"
    )
