"""The second text of the accuracy benchmark, far from the one that variants are calibrated on.

By default it is the licences of the installed packages: English prose without code that every machine has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from accuracy_making import Row, base_folder, silent
from rich.console import Console

from pipeline.config.schema import Config
from pipeline.errors import DataError
from pipeline.evaluation.model_result import Quality
from pipeline.system.files import fingerprint, read_json, states, write_json, write_text
from pipeline.workflow.workspace import Workspace

_LICENCE = re.compile(r"licen[cs]e|copying|notice", re.IGNORECASE)
LICENCES = "licences"  # names the default text
SHORTEST_PARAGRAPH, SHORTEST_DOCUMENT = 150, 2000  # characters


def second_text(given: str | None, folder: Path) -> Path:
    """Return the file of the second text: a copy of the given one, or the licences, written once.

    Raises:
        DataError: if there is no such text.
    """
    path = folder / "second.txt"
    if given not in (None, LICENCES):
        from pipeline.data import general_text

        text = general_text(given)
    elif path.is_file():
        return path
    else:
        text = "\n\n\n".join(licences())
        if not text:
            raise DataError("--second: the installed packages have no licences. Try: --second FILE.txt")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def licences() -> Iterator[str]:
    """Yield the licences of the installed packages as documents; a paragraph that an earlier one has is left out."""
    seen = set()
    for package in sorted(metadata.distributions(), key=lambda found: found.metadata["Name"].lower()):
        for file in sorted(package.files or (), key=str):
            path = Path(str(package.locate_file(file)))
            if ".dist-info" not in str(file) or not _LICENCE.search(file.name) or not path.is_file():
                continue
            kept = []
            for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
                words = " ".join(re.findall(r"[a-z]+", paragraph.lower()))
                if len(words) >= SHORTEST_PARAGRAPH and words not in seen:
                    seen.add(words)
                    kept.append(paragraph.strip("\n"))
            if len(text := "\n\n".join(kept)) >= SHORTEST_DOCUMENT:
                yield text


def with_second_text(rows: list[Row], config: Config, base: Workspace, text: Path, console: Console) -> list[Row]:
    """Return the rows with their figures on a second text; the full-precision model comes first.

    Figures of files that did not change are kept beside the text.
    """
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.workflow.stages.inputs import run_texts

    place, source = text.parent, base_folder(base)
    settings = config.evaluate.model_copy(update={"general": str(text)})
    config, texts = config.model_copy(update={"evaluate": settings}), replace(run_texts(base), reference=place, plan={})
    found, digest = [], fingerprint(text.read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        if row.folder is None:
            found.append(row)
            continue
        weights = states(sorted(path for path in row.folder.iterdir() if path.is_file()))
        about = fingerprint([digest, weights, settings.max_tokens])
        notes = place / f"{fingerprint(str(row.folder))}.json"
        kept = read_json(notes, {})
        if kept.get("about") != about:
            console.print(f"{row.label}: second text")
            reference = source if number else None
            result = evaluate(row.label, row.folder, config, texts, silent, reference, in_full=False)
            (quality,) = result.quality.values()
            kept = {"about": about, "quality": quality.to_json()}
            write_json(notes, kept)
        found.append(replace(row, second=Quality.model_validate(kept["quality"])))
    return found
