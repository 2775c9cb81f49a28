"""Comparison of a killed and resumed run with an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.verification import Verdict, verify
from tests.support.runs import Place

# What two runs of the same thing may differ in: times, speeds, memory, and that one of them was resumed.
VOLATILE = re.compile(r"seconds|per_second|runtime|peak_memory|resumed_from_step|^(finished|mtime_ns)$")
DOCUMENTS = re.compile(r"(^|/)(README\.md|tunepress\.json)$|^assets/")


def differences(place: Place, undisturbed: Place) -> Iterator[str]:
    """What of a resumed run is not as it is in an undisturbed one; nothing where all is."""
    yield from _files(place, undisturbed)
    yield from _figures(place, undisturbed)
    yield from _events(place, undisturbed)
    yield from _on_the_hub(place, undisturbed)
    yield from _left_over(place, undisturbed)


def _files(place: Place, undisturbed: Place) -> Iterator[str]:
    """Weights, configurations, tokenizer and adapter, hash for hash; of documents only that they are there."""
    for folder in ("release", "adapter", "data"):
        here, there = (_hashes(p.run_folder / folder) for p in (place, undisturbed))
        for name in sorted(here.keys() ^ there.keys()):
            yield f"{folder}/{name}: only in {'the resumed' if name in here else 'the undisturbed'} run"
        for name in sorted(here.keys() & there.keys()):
            if here[name] != there[name] and not DOCUMENTS.search(name):
                yield f"{folder}/{name}: other bytes"


def _figures(place: Place, undisturbed: Place) -> Iterator[str]:
    """The lineage, but for what may vary, and the cards and picture, which have to be those of the lineage."""
    here, there = (json.loads((p.release / "tunepress.json").read_bytes()) for p in (place, undisturbed))
    for path in _unequal(_lasting(here), _lasting(there)):
        yield f"tunepress.json: {path}"
    for path in _unequal(_lasting(place.results()), _lasting(undisturbed.results())):
        yield f"results.json: {path}"
    for finding in verify(str(place.release), measure=False).findings:
        if finding.verdict is not Verdict.right:
            yield f"{finding.subject}: {finding.message}"


def _events(place: Place, undisturbed: Place) -> Iterator[str]:
    """Every event of the undisturbed run, in the spool and once in Trackio; and no failure but by the kill."""
    missing = set(undisturbed.names()) - set(place.names())
    if missing:
        yield f"events: missing {', '.join(sorted(missing))}"
    told = sorted(alert["title"] for alert in place.alerts())
    if told != sorted(event["event"] for event in place.events()):
        yield "Trackio: not what the spool has, each event once"
    for event in place.events():
        if event["event"].endswith("_failed") and event["error"] not in ("Terminated", "Killed"):
            yield f"events: {event['event']}: {event['error']}: {event['message']}"


def _on_the_hub(place: Place, undisturbed: Place) -> Iterator[str]:
    """The head is the release to the byte, and tagged; every commit was a whole release, and true."""
    hub, repo = place.hub, "ada/tiny"
    head = hub.commit_files(repo, "main")
    here = {path.relative_to(place.release).as_posix(): path for path in place.release.rglob("*") if path.is_file()}
    for name in sorted(here.keys() ^ (head.keys() - {".gitattributes"})):
        yield f"the Hub: {name} is {'missing' if name in here else 'not of the release'}"
    for name in sorted(here.keys() & head.keys()):
        if hub.read(repo, name) != here[name].read_bytes():
            yield f"the Hub: {name} has other bytes"
    if list(hub.repo(repo).tags) != list(undisturbed.hub.repo(repo).tags):
        yield f"the Hub: tags {', '.join(hub.repo(repo).tags)}"
    yield from untrue_commits(hub, repo)


def untrue_commits(hub: Any, repo: str) -> Iterator[str]:
    """Commits, but for the Hub's own first one, whose lineage does not name exactly the files that are there."""
    for commit in hub.commits(repo)[:-1]:
        files = hub.commit_files(repo, commit)
        if "tunepress.json" not in files:
            yield f"the Hub: commit {commit[:8]} has no lineage"
            continue
        lineage = json.loads(hub.read(repo, "tunepress.json", commit))
        named = {path: about["sha256"] for path, about in lineage["files"].items()}
        there = {p: f.sha256 for p, f in files.items() if p not in (".gitattributes", "tunepress.json")}
        documents = set(lineage["documents"])
        if named != {path: sha for path, sha in there.items() if path not in documents} or documents - there.keys():
            yield f"the Hub: commit {commit[:8]} is not what its lineage says"


def _left_over(place: Place, undisturbed: Place) -> Iterator[str]:
    """Nothing half-written lies about."""
    here, there = (
        {p.relative_to(q.run_folder).as_posix() for p in q.run_folder.rglob("*") if p.is_file()}
        for q in (place, undisturbed)
    )
    for name in sorted(here - there):
        yield f"{name}: left over"


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _lasting(content: Any) -> Any:
    """Plain data without what may vary, and without the hashes of documents, in which that is told."""
    if isinstance(content, dict):
        return {key: _lasting(value) for key, value in content.items() if not VOLATILE.search(key)}
    return [_lasting(value) for value in content] if isinstance(content, list) else content


def _unequal(here: Any, there: Any, path: str = "") -> Iterator[str]:
    """Where two trees of plain data differ, and how."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in here.keys() | there.keys():
            yield from _unequal(here.get(key), there.get(key), f"{path}/{key}")
    elif here != there:
        yield f"{path} is {here!r:.80}, not {there!r:.80}"
