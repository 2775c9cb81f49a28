"""Writes down, in the file that SPY_ON_DISK names, what a process has on the disk, and what it gives another name when.

Python imports this first wherever its folder is in PYTHONPATH. What is synced is noted after it was, and what is
renamed before it is, so that the notes of several processes never show an order that is better than the true one.
"""

import json
import os

_NOTES = os.environ.get("SPY_ON_DISK")


def _state(path) -> list[int]:
    """What tells a file, or a folder, as it is now from another, and from itself after a change."""
    found = os.stat(path)
    return [found.st_ino, found.st_mtime_ns, 0 if os.path.isdir(path) else found.st_size]


def _note(**about) -> None:
    descriptor = os.open(_NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(about).encode() + b"\n")
    os.close(descriptor)


def _noting_sync(sync):
    def noting(file):
        descriptor = file if isinstance(file, int) else file.fileno()
        state = _state(descriptor)
        sync(descriptor)
        _note(did="sync", state=state)

    return noting


def _noting_rename(rename):
    def noting(source, target, **options):
        source, target = os.fspath(source), os.fspath(target)
        below = [os.path.join(place, name) for place, *names in os.walk(source) for name in names[0] + names[1]]
        about = {path: _state(path) for path in (source, *below)}
        if os.path.basename(target) == "ledger.json":
            about |= _recorded(source)
        parent = os.stat(os.path.dirname(os.path.abspath(target))).st_ino
        there = {"source": os.path.abspath(source), "to": os.path.abspath(target)}
        _note(did="rename", parent=parent, states=about, **there)
        rename(source, target, **options)

    return noting


def _recorded(ledger: str) -> dict:
    """The files that a ledger records, as they are now, their folders but for its own, and the spool."""
    folder = os.path.dirname(os.path.abspath(ledger))
    with open(ledger) as file:
        outputs = {path for entry in json.load(file)["steps"].values() for path in entry["outputs"]}
    files = {os.path.normpath(os.path.join(folder, path)) for path in (*outputs, "events.jsonl")}
    there = {path for path in files if os.path.exists(path)}  # the others are about to be made anew
    return {path: _state(path) for path in there | set(map(os.path.dirname, there)) - {folder}}


if _NOTES:
    os.fsync = _noting_sync(os.fsync)
    os.rename, os.replace = _noting_rename(os.rename), _noting_rename(os.replace)
