"""The chat template that a run uses: the one that is chosen, the model's default, or one that is supplied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.data.supplied_template import supply_template
from pipeline.errors import DataError


def default_template(tokenizer: Any) -> str | None:
    """Return the chat template of ordinary conversations, or None if the tokenizer has none.

    Raises:
        DataError: if it has several templates, and none is the default.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return templates
    if "default" not in templates:
        name = tokenizer.name_or_path or "the tokenizer"
        raise DataError(
            f"{name}: has several chat templates ({', '.join(templates)}), and none is the default. "
            f"Try: data.chat_template={next(iter(templates))} (for training), or no evaluate.prompts"
        )
    return templates["default"]


def choose_template(tokenizer: Any, chosen: str | None) -> str | None:
    """Make the chosen chat template the tokenizer's own. If there is no choice and no template, supply one.

    Args:
        chosen: the name of one of the tokenizer's templates, or a file.

    Returns:
        The chosen template, or None without a choice.

    Raises:
        DataError: if it is neither, or there is no default and no choice.
    """
    if chosen is None:
        supply_template(tokenizer)
        default_template(tokenizer)
        return None
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chosen not in templates:
        try:
            templates = {**templates, chosen: Path(chosen).expanduser().read_text(encoding="utf-8")}
        except (OSError, RuntimeError, UnicodeDecodeError):
            known = f"; the model has {', '.join(templates)}" if templates else ""
            raise DataError(
                f"data.chat_template {chosen!r}: not a readable file, and not the name of one of the model's chat "
                f"templates{known}. Try: a file"
            ) from None
    tokenizer.chat_template = templates[chosen]
    return templates[chosen]
