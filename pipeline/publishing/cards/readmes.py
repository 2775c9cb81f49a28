"""README.md files that people may edit: their text stays if ours changes or goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.hub.tree import CARD, Content, Tree
from pipeline.publishing.cards.own_text import keep_own_text, our_part, section_only, their_part


def merged(rendered: bytes, existing: bytes | None, guest: bool = False) -> bytes:
    """Return `rendered` with the text that people wrote into `existing`.

    Args:
        guest: True if the card belongs to another model, whose author owns the metadata.

    Raises:
        UserError: if `existing` is not UTF-8.
    """
    if existing is None:
        return rendered
    text, there = rendered.decode(), _decode(existing)
    return keep_own_text(section_only(text, there) if guest else text, there).encode()


def brought_back(old: bytes, existing: bytes | None) -> bytes:
    """Return a README.md of an older release with our part of then, and people's text of now."""
    ours = our_part(_decode(old))
    if ours is None:
        return old if existing is None else existing
    return merged(ours.encode(), existing)


def left_behind(tree: Tree, wanted: Mapping[str, Content]) -> dict[str, bytes]:
    """Return people's text in the README.md files that a commit removes; it stays when our part goes."""
    gone = [path for path in tree.ours - wanted.keys() if Path(path).name == CARD]
    parts = {path: their_part(_decode(tree.read(path) or b"")) for path in sorted(gone)}
    return {path: f"{part}\n".encode() for path, part in parts.items() if part}


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{CARD}: not UTF-8. Try: save it as UTF-8, and run again") from None
