"""Where a model came from: what its own card, and its tokenizer, say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """Where a model came from, as the card and the lineage tell it. None where nothing says so.

    `changes` says in words what was done to its weights before training, if anything.
    """

    source: str
    name: str
    revision: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    hub_id: str | None = None
    changes: str | None = None


def read_origin(folder: Path, source: str, name: str, revision: str | None = None, hub_id: str | None = None) -> Origin:
    """What the files in a model's folder say of it; nothing is claimed that they do not say."""
    card = _front_matter(folder / "README.md")
    return Origin(
        source=source,
        name=name,
        revision=revision,
        license=text(card.get("license")),
        languages=texts(card.get("language")),
        hub_id=hub_id,
    )


def has_chat_template(folder: Path) -> bool:
    """Can the tokenizer in `folder` put a conversation into one text?"""
    settings = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _front_matter(path: Path) -> dict:
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}
    try:
        return ModelCard.load(path).data.to_dict()
    except Exception:  # a card of any shape; what cannot be read says nothing
        return {}


def text(value: object) -> str | None:
    """A value of a card if it is a text."""
    return value if isinstance(value, str) and value else None


def texts(value: object) -> tuple[str, ...]:
    """A value of a card that is a text, or several."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(v for v in values if isinstance(v, str))
