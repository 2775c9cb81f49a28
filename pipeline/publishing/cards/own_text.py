"""The card of a repository in which people wrote text of their own: only our part of it changes.

Our part stands between two HTML comments, each on a line of people's text or of its own.
"""

from __future__ import annotations

import re

from pipeline.publishing.cards import front_matter
from pipeline.publishing.cards.markdown import fence_marks

START, END = "<!-- tunepress:start -->", "<!-- tunepress:end -->"
_NEWLINE = re.compile(r"\r\n|\r|\n")
_FRONT = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)(?:([\S\s]*?)(?:\r\n|\r|\n))??---[ \t]*(?:\r\n|\r|\n|\Z)")
_LINE = re.compile(r"([^\r\n]+)(?:\r\n|\r|\n|\Z)")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*\Z)|~{3,})(.*)")
_INSIDE = re.compile(r" {4}| {0,3}\t| {0,3}>")  # an indented code block, a quotation
_MARKER = re.compile(rf"(?P<code>(?<!`)(`+)(?!`).*?(?<!`)\2(?!`))|{re.escape(START)}|{re.escape(END)}")
_NO_METADATA = "<!-- tunepress:metadata -->"  # the note of a section in a card whose metadata is all its author's
_NOTE = re.compile(r"<!-- tunepress:metadata( [\w-]+=[0-9a-f]{8})* -->")
_UNREADABLE = "The metadata of this card could not be read, and was moved here:"


def note(metadata: str) -> str:
    """A line for our section that says which metadata we wrote, so that people's changes can be told from ours."""
    digests = front_matter.digests(metadata).items()
    return " ".join(["<!-- tunepress:metadata", *(f"{key}={digest}" for key, digest in digests), "-->"])


def keep_own_text(rendered: str, existing: str) -> str:
    """`existing` with our section and our metadata replaced by those of `rendered`, and the rest as it is.

    A section goes from a start marker to the end marker that comes next. Where there are several, the first is
    replaced and the others go. A marker without a partner, and one that stands in code, is text like any other.
    Without a section, ours follows at the end, after a code block that was left open is closed. Line breaks are
    those of `existing`. Metadata that cannot be read (no YAML, no mapping, a key twice) moves, word for word,
    into a code block at the top of the text, where its author finds it, and ours takes its place.
    Where `rendered` has no metadata, not a byte before the section changes.

    Applied twice it gives, byte for byte, what it gives when applied once.
    """
    if not existing.strip("\ufeff \t\r\n"):
        return rendered
    newline = found[0] if (found := _NEWLINE.search(existing)) else "\n"
    ours, section = _ours(rendered)
    theirs, body = _parts(existing.removeprefix("\ufeff"))  # before the first line it would hide the metadata
    found, open_fence = _sections(body)
    written = _written(body[slice(*found[0])]) if found else {}
    before = existing.removesuffix(body)
    section = _NEWLINE.sub(newline, section)
    body = _with_section(body, section, newline, found, open_fence)
    while len((again := _sections(body))[0]) > 1:  # what was around one that went may be one now
        body = _with_section(body, section, newline, *again)
    if ours is None:
        return before + body
    merged = front_matter.merge(ours, theirs or "", newline, written)
    if merged is None:
        merged, body = newline.join(_NEWLINE.split(ours)), _as_code(theirs or "", newline) + body
    return newline.join(["---", merged, "---", body])


def section_only(rendered: str, existing: str) -> str:
    """`rendered` without its metadata, unless `existing` has metadata from us."""
    _, theirs = _ours(existing)
    if not existing.strip("\ufeff \t\r\n") or _written(theirs):
        return rendered
    return _NOTE.sub(_NO_METADATA, _ours(rendered)[1]) + "\n"


def our_part(card: str) -> str | None:
    """What of a published card is ours: its section, and the metadata that we wrote; None where it has no section."""
    metadata, section = _ours(card)
    if not section:
        return None
    if _NO_METADATA in section:
        return _NEWLINE.sub("\n", f"{section}\n")
    written = _written(section)
    ours = front_matter.only(metadata or "", written) if written else metadata or ""
    return _NEWLINE.sub("\n", f"---\n{ours}\n---\n{section}\n")


def their_part(card: str) -> str:
    """What people wrote into a card beside our section and the metadata; empty where they wrote nothing."""
    metadata, body = _parts(card.removeprefix("\ufeff"))
    for begin, end in reversed(_sections(body)[0]):
        line_end = found.end() if (found := _NEWLINE.match(body, end)) else end
        body = body[:begin] + body[line_end:]
    if front_matter.merge("", metadata or "") is None:
        body = _as_code(metadata or "", "\n") + body
    return body.strip()


def _ours(card: str) -> tuple[str | None, str]:
    """(metadata, our section or "")"""
    metadata, body = _parts(card.removeprefix("\ufeff"))
    found, _ = _sections(body)
    return metadata, body[slice(*found[0])] if found else ""


def _parts(card: str) -> tuple[str | None, str]:
    """(metadata without its dashes, everything after it)"""
    front = _FRONT.match(card)
    return (front[1], card[front.end() :]) if front else (None, card)


def _as_code(metadata: str, newline: str) -> str:
    marks = fence_marks(metadata)
    return newline.join([_UNREADABLE, "", f"{marks}yaml", metadata, marks, "", ""])


def _written(section: str) -> dict[str, str]:
    found = _NOTE.search(section)
    return dict(re.findall(r" ([\w-]+)=(\w+)", found[0])) if found else {}


def _with_section(text: str, section: str, newline: str, found: list[tuple[int, int]], open_fence: str) -> str:
    if found:
        between = [text[end:begin] for (_, end), (begin, _) in zip(found, [*found[1:], (len(text), 0)], strict=True)]
        return text[: found[0][0]] + section + "".join(between)
    lines = [text if text.endswith(("\r", "\n")) or not text else text + newline]
    if open_fence:
        lines.append(open_fence + newline)
    if text.strip():
        lines.append(newline)
    return "".join([*lines, section, newline])


def _sections(text: str) -> tuple[list[tuple[int, int]], str]:
    """(begin, end) of every section, and the fence of a code block that `text` leaves open, or "".

    Code blocks are minded between sections only: one that somebody broke within a section ends with it.
    """
    found: list[tuple[int, int]] = []
    begin, fence = None, ""
    for line in _LINE.finditer(text):
        if mark := _FENCE.match(line[1]):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif not _INSIDE.match(line[1]):
            for marker in _MARKER.finditer(line[1]):
                if marker[0] == START:
                    begin = None if fence else line.start() + marker.start()
                elif marker[0] == END and begin is not None:
                    found.append((begin, line.start() + marker.end()))
                    begin, fence = None, ""
    return found, fence
