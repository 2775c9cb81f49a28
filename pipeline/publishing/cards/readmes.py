"""README.md files, in which people may write beside us: what is theirs stays when ours changes or goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.hub.tree import CARD, Content, Tree
from pipeline.publishing.cards.own_text import keep_own_text, our_part, section_only, their_part


def merged(rendered: bytes, existing: bytes | None, guest: bool = False) -> bytes:
    """`rendered`, with what people wrote into `existing`.

    Args:
        guest: is the card another model's, whose metadata is its author's?

    Raises:
        UserError: where that is no text.
    """
    if existing is None:
        return rendered
    text, there = rendered.decode(), _decode(existing)
    return keep_own_text(section_only(text, there) if guest else text, there).encode()


def brought_back(old: bytes, existing: bytes | None) -> bytes:
    """A README.md of an older release: our part as it was then, with what people have written beside it now."""
    ours = our_part(_decode(old))
    if ours is None:
        return old if existing is None else existing
    return merged(ours.encode(), existing)


def left_behind(tree: Tree, wanted: Mapping[str, Content]) -> dict[str, bytes]:
    """What people wrote into those README.md that are to go; it stays there when our part of them goes."""
    gone = [path for path in tree.ours - wanted.keys() if Path(path).name == CARD]
    parts = {path: their_part(_decode(tree.read(path) or b"")) for path in sorted(gone)}
    return {path: f"{part}\n".encode() for path, part in parts.items() if part}


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError(f"the {CARD} that is there is not UTF-8; save it as UTF-8, and run again") from None
