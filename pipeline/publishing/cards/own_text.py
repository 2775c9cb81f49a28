"""Cards with text that people wrote: only our section and our metadata change.

Our section stands between two HTML comments. Each may share a line with people's text.
"""

from __future__ import annotations

import re

from pipeline.publishing.cards import front_matter
from pipeline.publishing.cards.markdown import fence_marks
from pipeline.system.hub_yaml import FRONT_MATTER

START, END = "<!-- tunepress:start -->", "<!-- tunepress:end -->"
_NEWLINE = re.compile(r"\r\n|\r|\n")
_LINE = re.compile(r"([^\r\n]+)(?:\r\n|\r|\n|\Z)")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*\Z)|~{3,})(.*)")
_INSIDE = re.compile(r" {4}| {0,3}\t| {0,3}>")  # an indented code block, a quotation
_MARKER = re.compile(rf"(?P<code>(?<!`)(`+)(?!`).*?(?<!`)\2(?!`))|{re.escape(START)}|{re.escape(END)}")
_NO_METADATA = "<!-- tunepress:metadata -->"  # the note of a section in a card whose metadata is all its author's
_NOTE = re.compile(r"<!-- tunepress:metadata( [\w-]+=[0-9a-f]{8})* -->")
_UNREADABLE = "The metadata of this card could not be read, and was moved here:"


def note(metadata: str) -> str:
    """Return a line for our section with a digest of each metadata value, which reveals people's later changes."""
    digests = front_matter.digests(metadata).items()
    return " ".join(["<!-- tunepress:metadata", *(f"{key}={digest}" for key, digest in digests), "-->"])


def keep_own_text(rendered: str, existing: str) -> str:
    """Return `existing` with our section and metadata replaced by those of `rendered`; all other text stays.

    A section goes from a start marker to the next end marker. Of several sections, the first is replaced and the
    others are removed. A marker in code or without a partner is ordinary text. If there is no section, ours is
    appended, after an open code block is closed. Line breaks are those of `existing`. Unreadable metadata (no YAML,
    no mapping, a key twice) moves unchanged into a code block at the top of the text, and ours takes its place.
    If `rendered` has no metadata, every byte before the section stays.

    A second call with the same arguments changes nothing.
    """
    if not existing.strip("\ufeff \t\r\n"):
        return rendered
    newline = first[0] if (first := _NEWLINE.search(existing)) else "\n"
    ours, section = _ours(rendered)
    theirs, body = _parts(existing.removeprefix("\ufeff"))  # a byte order mark would hide the metadata
    found, open_fence = _sections(body)
    written = _written(body[slice(*found[0])]) if found else {}
    before = existing.removesuffix(body)
    section = _NEWLINE.sub(newline, section)
    body = _with_section(body, section, newline, found, open_fence)
    while len((again := _sections(body))[0]) > 1:  # text around a removed section may form a new one
        body = _with_section(body, section, newline, *again)
    if ours is None:
        return before + body
    merged = front_matter.merge(ours, theirs or "", newline, written)
    if merged is None:
        merged, body = newline.join(_NEWLINE.split(ours)), _as_code(theirs or "", newline) + body
    return newline.join(["---", merged, "---", body])


def section_only(rendered: str, existing: str) -> str:
    """Return `rendered` without its metadata, unless `existing` has metadata from us."""
    _, theirs = _ours(existing)
    if not existing.strip("\ufeff \t\r\n") or _written(theirs):
        return rendered
    return _NOTE.sub(_NO_METADATA, _ours(rendered)[1]) + "\n"


def our_part(card: str) -> str | None:
    """Return our section of a published card with the metadata that we wrote; None if it has no section."""
    metadata, section = _ours(card)
    if not section:
        return None
    if _NO_METADATA in section:
        return _NEWLINE.sub("\n", f"{section}\n")
    written = _written(section)
    ours = front_matter.only(metadata or "", written) if written else metadata or ""
    return _NEWLINE.sub("\n", f"---\n{ours}\n---\n{section}\n")


def their_part(card: str) -> str:
    """Return the text of a card without our section and the metadata; empty if people wrote nothing."""
    metadata, body = _parts(card.removeprefix("\ufeff"))
    for begin, end in reversed(_sections(body)[0]):
        line_end = found.end() if (found := _NEWLINE.match(body, end)) else end
        body = body[:begin] + body[line_end:]
    if front_matter.merge("", metadata or "") is None:
        body = _as_code(metadata or "", "\n") + body
    return body.strip()


def _ours(card: str) -> tuple[str | None, str]:
    """Return the metadata, and our section or ""."""
    metadata, body = _parts(card.removeprefix("\ufeff"))
    found, _ = _sections(body)
    return metadata, body[slice(*found[0])] if found else ""


def _parts(card: str) -> tuple[str | None, str]:
    """Return the metadata without its dashes, and everything after it."""
    front = FRONT_MATTER.match(card)
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
    """Return (begin, end) of every section, and the fence of a code block that `text` leaves open, or "".

    Only code blocks between sections count: a broken one inside a section ends with the section.
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
