"""The origin of a model: what its own card and tokenizer say."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.models.checkpoint_files import TERMS_FILES
from pipeline.system.hub_yaml import FRONT_MATTER, UNREADABLE, HubLoader


@dataclass(frozen=True)
class Origin:
    """The origin of a model, as the card and the lineage state it; None if nothing states it.

    Attributes:
        license: as the card names it; several are separated by commas.
        license_name, license_link: name and text of a license that the Hub does not list (`other`).
        changes: in words how its weights were changed before training, if at all.
    """

    source: str
    name: str
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    hub_id: str | None = None
    changes: str | None = None


def read_origin(
    folder: Path,
    source: str,
    name: str,
    revision: str | None = None,
    hub_id: str | None = None,
    tell: Callable[[str], object] = print,
) -> Origin:
    """Return the origin that the files in a model's folder state.

    Args:
        tell: called with a line for each key of its card that cannot be read.
    """
    card, unread = _front_matter(folder / "README.md")
    values: dict[str, tuple[str, ...]] = {}
    for key in ("license", "license_name", "license_link", "language"):
        values[key] = texts(card.get(key))
        if key in unread or card.get(key) and not values[key]:
            way_out = ". Try: publish.license" if key == "license" else ""
            tell(f"{source}: {key} in its card cannot be read, and is left out of yours{way_out}")
    return Origin(
        source=source,
        name=name,
        revision=revision,
        license=", ".join(values["license"]) or None,
        license_name=next(iter(values["license_name"]), None),
        license_link=_reachable(folder, hub_id, values["license_link"]),
        languages=values["language"],
        hub_id=hub_id,
    )


def _reachable(folder: Path, hub_id: str | None, links: tuple[str, ...]) -> str | None:
    """Return a link to a license from another repository: a file of terms is copied, and others stay where they are."""
    link = next(iter(links), None)
    if link is None or link.startswith(("https://", "http://")):
        return link
    if TERMS_FILES.match(link) and (folder / link).is_file():
        return link
    return f"https://huggingface.co/{hub_id}/blob/main/{link}" if hub_id else None


def _front_matter(path: Path) -> tuple[dict, list[str]]:
    """Return the metadata of a card, and the keys whose values are no YAML. One bad value does not hide the others."""
    try:
        found = FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff"))
    except OSError:
        found = None
    if found is None or not found[1]:
        return {}, []
    with suppress(*UNREADABLE):
        whole = yaml.load(found[1], Loader=HubLoader)
        return (whole, []) if isinstance(whole, dict) else ({}, [])
    card: dict = {}
    unread = []
    for block in re.split(r"^(?=[\w-]+[ \t]*:)", found[1], flags=re.MULTILINE):
        try:
            card |= yaml.load(block, Loader=HubLoader) or {}
        except UNREADABLE:
            unread.append(block.partition(":")[0].strip())
    return card, unread


def text(value: object) -> str | None:
    """Return a value of a card if it is a text, else None."""
    return value if isinstance(value, str) and value else None


def texts(value: object) -> tuple[str, ...]:
    """Return a value of a card that is one text or several."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(v for v in values if isinstance(v, str))
