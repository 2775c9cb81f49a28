"""The YAML at the top of a card: ours merged into one that people edited, with no word of theirs lost.

What does not change stays byte for byte, comments and order included; only the lines of
keys whose value changes are written anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from pipeline.config.catalog import VARIANTS

# What PyYAML raises for a text from anywhere: also an `!!int` that is none, or a 30th of February.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError)
SOURCE = "tunepress"  # the name under which our results stand in a model index


class _Loader(yaml.SafeLoader):
    """Reads words as the Hub does, by YAML 1.2: `no` is a language, and a date is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if not tag.endswith((":bool", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)


def digests(metadata: str) -> dict[str, str]:
    """A short digest of the value of each key, by which it is known later whether people changed it."""
    found = yaml.load(metadata, Loader=_Loader) or {}
    return {key: _digest(value) for key, value in found.items()}


def merge(ours: str, theirs: str, newline: str = "\n", written: Mapping[str, str] | None = None) -> str | None:
    """`theirs` with our keys brought up to date, and every other key of theirs as it was.

    What we wrote the last time is replaced, or goes where we have no value any more. What people changed since
    stays as they left it, a licence they corrected say; where ours is another than then, it is added to their
    lists. So it is to lists that were there before us (`tags` lose the names of variants that are gone); of other
    keys that both have ours counts. `model-index` keeps the results that are not ours.

    Args:
        written: the digests of what we wrote the last time.

    Returns:
        None where `theirs` cannot be read: no YAML, no mapping, or a key twice.
    """
    try:
        node, found = _read(theirs)
    except UNREADABLE:
        return None
    found = {} if found is None else found
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if not isinstance(found, dict) or any(keys.count(key) > 1 for key in keys):
        return None
    wanted = _merged(yaml.load(ours, Loader=_Loader) or {}, found, written or {})
    mapped = node is None or isinstance(node, yaml.MappingNode)
    # YAML allows a byte order mark at the beginning of a text alone.
    plain = mapped and keys == list(found) and "\ufeff" not in theirs
    edited = _edited(theirs, node, found, wanted, newline) if plain else None
    return edited if edited is not None and _says(edited, wanted) else _dump(wanted, newline)


def only(metadata: str, keys: Collection[str]) -> str:
    """`metadata` without the keys that are not among `keys`; empty where it cannot be read."""
    try:
        _, found = _read(metadata)
    except UNREADABLE:
        return ""
    wanted = {key: value for key, value in found.items() if key in keys} if isinstance(found, dict) else {}
    return _dump(wanted, "\n") if wanted else ""


def _read(text: str) -> tuple[yaml.Node | None, Any]:
    """A text as YAML has it, and what that says, if that can be written again: a number may have too many digits."""
    node, found = yaml.compose(text, Loader=_Loader), yaml.load(text, Loader=_Loader)
    _dump(found, "\n")
    return node, found


def _merged(ours: dict, theirs: dict, written: Mapping[str, str]) -> dict:
    untouched = {key for key, digest in written.items() if key in theirs and _digest(theirs[key]) == digest}
    merged = {key: value for key, value in theirs.items() if key in ours or key not in untouched}
    for key, value in ours.items():
        changed = key in theirs and key not in untouched
        merged[key] = _kept(key, value, theirs[key], written.get(key)) if changed else value
    if "license" in merged and merged["license"] != ours.get("license") and "license_name" not in theirs:
        merged.pop("license_name", None)  # it belongs to the license that is ours
    if "model-index" not in untouched and isinstance(index := merged.get("model-index"), list):
        merged["model-index"] = index = _index(ours.get("model-index") or [], theirs.get("model-index"))
        if not index:
            del merged["model-index"]
    return merged


def _kept(key: str, ours: Any, theirs: Any, written: str | None) -> Any:
    """What becomes of a value that people wrote or changed; `written` is the digest of ours the last time."""
    if key == "model-index":
        return ours
    if written == _digest(ours):
        return theirs
    if isinstance(ours, list):
        gone = VARIANTS.keys() - set(ours) if key == "tags" else ()
        stay = [value for value in _list(theirs) if not (isinstance(value, str) and value in gone)]
        return stay + [value for value in ours if value not in stay]
    return ours if written is None else theirs


def _index(ours: list, theirs: Any) -> list:
    """A model index with our results and those of theirs that we did not put there; ours stand where they stood."""
    mine, found = {entry["name"]: entry for entry in ours}, []
    measured = [result for entry in ours for result in entry["results"]]
    for entry in theirs if isinstance(theirs, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("results"), list):
            kept = [r for r in entry["results"] if not _is_ours(r) and not any(_covers(m, r) for m in measured)]
            new = mine.pop(entry["name"], None) if isinstance(entry.get("name"), str) else None
            if new is None and not kept and entry["results"]:
                continue
            entry = {**entry, "results": [*(new["results"] if new else ()), *kept]}
        found.append(entry)
    return found + list(mine.values())


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == SOURCE


def _covers(new: Any, old: Any) -> bool:
    """Does `new` say all that `old` says, perhaps with other numbers?"""
    return _place(new) == _place(old) and _metrics(old) <= _metrics(new)


def _place(result: Any) -> Any:
    """The task and the data that a result is about."""
    try:
        about = result["dataset"]
        return [result["task"]["type"], *(about.get(key) for key in ("type", "config", "split", "revision"))]
    except (KeyError, TypeError, AttributeError):
        return None


def _metrics(result: Any) -> set[str]:
    metrics = result.get("metrics") if isinstance(result, dict) else None
    return {str(m.get("type")) for m in metrics or () if isinstance(m, dict)} if isinstance(metrics, list) else set()


def _edited(text: str, node: yaml.Node | None, old: dict, new: dict, newline: str) -> str | None:
    """`text` with only the lines of changed keys written anew; None where keys do not begin lines."""
    starts = [key.start_mark.index for key, _ in node.value] if node else [len(text)]
    if node and (node.flow_style or any(index and text[index - 1] not in "\r\n" for index in starts)):
        return None
    blocks = [text[: starts[0]]]
    for key, start, end in zip(old, starts, [*starts[1:], len(text)], strict=bool(node)):
        block = text[start:end]
        if key not in new or _dump(old[key], "\n") != _dump(new[key], "\n"):
            comments = re.findall(r"^[ \t]*#.*(?:\r\n|\r|\n)?", block, re.MULTILINE)
            block = (_dump({key: new[key]}, newline) + newline if key in new else "") + "".join(comments)
        blocks.append(block)
    added = {key: value for key, value in new.items() if key not in old}
    if added and (kept := "".join(blocks)) and not kept.endswith(("\r", "\n")):
        blocks.append(newline)
    blocks.append(_dump(added, newline) if added else "")
    edited = "".join(blocks)
    return edited if text.endswith(("\r", "\n")) else edited.removesuffix(newline)


def _says(text: str, wanted: dict) -> bool:
    try:
        return _dump(yaml.load(text, Loader=_Loader) or {}, "\n") == _dump(wanted, "\n")
    except UNREADABLE:
        return False


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:8]


def _dump(value: Any, newline: str) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, line_break=newline)
    return text.removesuffix(newline)


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
