"""Options of a chat template, such as `enable_thinking: false`: made the defaults of the template itself.

So encoding, generation, `chat` and the published model use the options of the training. A caller who passes the
variable still overrides the default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.data.template_choice import default_template
from pipeline.data.template_style import without_marks
from pipeline.errors import DataError

# The line break at its end is removed by every engine of these templates, so that the rest is as before.
_DEFAULT = "{%% if %s is not defined %%}{%% set %s = %s %%}{%% endif %%}\n"
# Variables that the caller of a template sets for each conversation.
_OF_THE_CALLER = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_OF_THE_TOKENIZER = {"bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now"}


def set_options(tokenizer: Any, options: Mapping[str, bool | int | float | str]) -> str:
    """Make values the defaults of variables of the tokenizer's chat template.

    Args:
        options: a variable that the template reads -> its value.

    Returns:
        The template, which is the tokenizer's own from now on.

    Raises:
        DataError: if the template does not read one of them, or tunepress sets it.
    """
    template = default_template(tokenizer) or ""
    read = options_of(template)
    for name in options:
        if name not in read:
            known = f"it reads {', '.join(sorted(read))}" if read else "it has no options"
            raise DataError(
                f"data.template_options.{name}: not an option of the chat template of "
                f"{tokenizer.name_or_path or 'the model'}, for {known}. Try: remove it"
            )
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in options.items()}
    template = "".join(_DEFAULT % (name, name, value) for name, value in values.items()) + template
    tokenizer.chat_template = template
    return template


def options_of(template: str) -> set[str]:
    """Return the variables that a chat template reads and that are neither messages, tools nor special tokens."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(without_marks(template))
        found = meta.find_undeclared_variables(parsed)
    except (TemplateSyntaxError, RecursionError):  # rendering says what is wrong with it
        return set()
    set_inside = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
    return found - set_inside - _OF_THE_CALLER - _OF_THE_TOKENIZER - environment.globals.keys()
