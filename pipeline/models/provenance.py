"""The origin of a model: what its own card and tokenizer say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """The origin of a model, as the card and the lineage state it; None if nothing states it.

    `changes` says in words how its weights were changed before training, if at all.
    """

    source: str
    name: str
    revision: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    hub_id: str | None = None
    changes: str | None = None


def read_origin(folder: Path, source: str, name: str, revision: str | None = None, hub_id: str | None = None) -> Origin:
    """Return the origin that the files in a model's folder state."""
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
    """Return True if the tokenizer in `folder` has a chat template."""
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
    """Return a value of a card if it is a text, else None."""
    return value if isinstance(value, str) and value else None


def texts(value: object) -> tuple[str, ...]:
    """Return a value of a card that is one text or several."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(v for v in values if isinstance(v, str))
