"""The state that a power cut would leave, from the notes of the spy in each process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def hasty(notes: Path, folder: Path) -> Iterator[str]:
    """Names below a folder that were given, and records that were made, before what they stand for was on the disk."""
    on_disk, unsettled = set(), {}
    for note in map(json.loads, notes.read_text().splitlines()):
        if note["did"] == "sync":
            on_disk.add(tuple(note["state"]))
            unsettled.pop(note["state"][0], None)
        elif folder in Path(note["to"]).parents:
            # What moves on needs no place on the disk where it was.
            unsettled = {parent: name for parent, name in unsettled.items() if name != note["source"]}
            for path, state in note["states"].items():
                if tuple(state) not in on_disk:
                    yield f"{note['to']}: came before {path} was on the disk"
            if note["to"].endswith("ledger.json"):
                named = {name for path in note["states"] for name in (path, *map(str, Path(path).parents))}
                hasty_names = [name for name in unsettled.values() if name in named]  # the ledger tells of no other
                yield from (f"{name}: its name was not on the disk before the ledger's" for name in hasty_names)
            unsettled[note["parent"]] = note["to"]
    yield from (f"{name}: its name was never had on the disk" for name in unsettled.values())
