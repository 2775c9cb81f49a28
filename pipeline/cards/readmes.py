"""README.md files, in which people may write beside us: what is theirs stays when ours changes or goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.cards.own_text import END, START, keep_own_text
from pipeline.errors import UserError
from pipeline.hub import Content, Tree

NAME = "README.md"
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*$.*?^---[ \t]*$", re.DOTALL | re.MULTILINE)


def merged(rendered: bytes, existing: bytes | None) -> bytes:
    """`rendered`, with what people wrote into `existing`.

    Raises:
        UserError: where that is no text.
    """
    if existing is None:
        return rendered
    return keep_own_text(rendered.decode(), _decode(existing)).encode()


def own_part(existing: bytes) -> bytes:
    """What people wrote into a README.md beside our section and its metadata; empty where they wrote nothing."""
    mark = f"{START}\n{END}"
    text = re.sub(rf"{START}(\r\n|\r|\n){END}(\r\n|\r|\n)?", "", keep_own_text(mark, _decode(existing)))
    body = _FRONT_MATTER.sub("", text).strip()
    return (body + "\n").encode() if body else b""


def left_behind(tree: Tree, wanted: Mapping[str, Content]) -> dict[str, bytes]:
    """What people wrote into those README.md that are to go; it stays there when our part of them goes."""
    gone = [path for path in tree.ours - wanted.keys() if Path(path).name == NAME]
    parts = {path: own_part(tree.read(path) or b"") for path in sorted(gone)}
    return {path: part for path, part in parts.items() if part}


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError("the README.md that is there is not UTF-8; save it as UTF-8, and run again") from None
