"""YAML metadata of a card: ours merged into metadata that people edited, without losing theirs.

Only the lines of changed keys are written again. All other lines stay byte for byte, with comments and order.
`ruamel.yaml` is no substitute: it drops the comments behind a value that is replaced, and changes spacing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from pipeline.config.catalog import VARIANTS
from pipeline.system.hub_yaml import UNREADABLE, HubLoader

SOURCE = "tunepress"  # the source of our results in a model index


def digests(metadata: str) -> dict[str, str]:
    """Return a short digest of the value of each key, which reveals people's later changes."""
    found = yaml.load(metadata, Loader=HubLoader) or {}
    return {key: _digest(value) for key, value in found.items()}


def merge(ours: str, theirs: str, newline: str = "\n", written: Mapping[str, str] | None = None) -> str | None:
    """Return `theirs` with our keys updated; every other key stays unchanged.

    A value that we wrote the last time is replaced, or removed if we have none now. A value that people changed
    since then stays; if our value changed too, it is added to their list. Lists that people had before us are
    extended as well (`tags` lose the names of removed variants). For other keys that both have, ours counts.
    `model-index` keeps results that are not ours.

    Args:
        written: the digests of the values that we wrote the last time.

    Returns:
        The merged metadata, or None if `theirs` cannot be read: no YAML, no mapping, or a key twice.
    """
    try:
        node, found = _read(theirs)
    except UNREADABLE:
        return None
    found = {} if found is None else found
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if not isinstance(found, dict) or any(keys.count(key) > 1 for key in keys):
        return None
    wanted = _merged(yaml.load(ours, Loader=HubLoader) or {}, found, written or {})
    mapped = node is None or isinstance(node, yaml.MappingNode)
    # YAML allows a byte order mark at the beginning of a text alone.
    plain = mapped and keys == list(found) and "\ufeff" not in theirs
    edited = _edited(theirs, node, found, wanted, newline) if plain else None
    return edited if edited is not None and _says(edited, wanted) else _dump(wanted, newline)


def only(metadata: str, keys: Collection[str]) -> str:
    """Return the entries of `metadata` with these keys; empty if the metadata cannot be read."""
    try:
        _, found = _read(metadata)
    except UNREADABLE:
        return ""
    wanted = {key: value for key, value in found.items() if key in keys} if isinstance(found, dict) else {}
    return _dump(wanted, "\n") if wanted else ""


def _read(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the node and the value of a YAML text. Raise if the value cannot be dumped (a number of many digits)."""
    node, found = yaml.compose(text, Loader=HubLoader), yaml.load(text, Loader=HubLoader)
    _dump(found, "\n")
    return node, found


def _merged(ours: dict, theirs: dict, written: Mapping[str, str]) -> dict:
    untouched = {key for key, digest in written.items() if key in theirs and _digest(theirs[key]) == digest}
    merged = {key: value for key, value in theirs.items() if key in ours or key not in untouched}
    for key, value in ours.items():
        changed = key in theirs and key not in untouched
        merged[key] = _kept(key, value, theirs[key], written.get(key)) if changed else value
    if "license" in merged and merged["license"] != ours.get("license") and "license_name" not in theirs:
        for key in ("license_name", "license_link"):  # of the license that is ours
            merged.pop(key, None)
    if "model-index" not in untouched and isinstance(index := merged.get("model-index"), list):
        merged["model-index"] = index = _index(ours.get("model-index") or [], theirs.get("model-index"))
        if not index:
            del merged["model-index"]
    return merged


def _kept(key: str, ours: Any, theirs: Any, written: str | None) -> Any:
    """Return the merged value of a key that people wrote or changed; `written` is the digest of our last value."""
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
    """Return a model index with our results in their old places, and every result that is not ours."""
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
    """Return True if `new` has every metric of `old` for the same task and data."""
    return _place(new) == _place(old) and _metrics(old) <= _metrics(new)


def _place(result: Any) -> Any:
    """Return the task and the data of a result."""
    try:
        about = result["dataset"]
        return [result["task"]["type"], *(about.get(key) for key in ("type", "config", "split", "revision"))]
    except (KeyError, TypeError, AttributeError):
        return None


def _metrics(result: Any) -> set[str]:
    metrics = result.get("metrics") if isinstance(result, dict) else None
    return {str(m.get("type")) for m in metrics or () if isinstance(m, dict)} if isinstance(metrics, list) else set()


def _edited(text: str, node: yaml.Node | None, old: dict, new: dict, newline: str) -> str | None:
    """Return `text` with the lines of changed keys written again; None if keys do not begin lines."""
    starts = [key.start_mark.index for key, _ in node.value] if node else [len(text)]
    if isinstance(node, yaml.MappingNode) and (
        node.flow_style or any(index and text[index - 1] not in "\r\n" for index in starts)
    ):
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
        return _dump(yaml.load(text, Loader=HubLoader) or {}, "\n") == _dump(wanted, "\n")
    except UNREADABLE:
        return False


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:8]


def _dump(value: Any, newline: str) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, line_break=newline)
    return text.removesuffix(newline)


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
