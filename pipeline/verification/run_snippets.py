"""The check of the snippets: each code block of a card is run unchanged, in a fresh process.

A snippet is run only if it is, byte for byte, the one that follows from the lineage. It then loads the verified
files instead of the location in the card.
"""

from __future__ import annotations

import ast
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.catalog import VARIANTS, is_one_file
from pipeline.evaluation.model_result import VariantSettings
from pipeline.hub.tree import CARD
from pipeline.inference.loaders import missing_packages
from pipeline.publishing import snippets
from pipeline.publishing.cards import About
from pipeline.publishing.lineage import own_version
from pipeline.system.libraries import is_installed
from pipeline.verification.check_cards import Cards, local, rendered
from pipeline.verification.findings import Finding, right, unknown, wrong
from pipeline.verification.lineage_claims import ADAPTER, ROOT, Claims
from pipeline.verification.location import Place

SECONDS = 3600  # enough for a large model on a small processor


def run_examples(claims: Claims, place: Place, cards: Cards, models: list[str]) -> Iterator[Finding]:
    """Yield a finding for each snippet that loads one of these models."""
    for model in (model for model in models if model != ADAPTER):
        expected, ours = of_model(cards.about, claims, model), of_model(local(cards.about, place), claims, model)
        there = snippets.blocks((place.read(card_of(claims, model)) or b"").decode(errors="replace"))
        if not ours or not set(expected) <= set(there):
            yield _others(claims, model)
            continue
        if is_one_file(model) and not is_installed("llama_cpp"):
            yield unknown("snippets", model, "not run: needs llama-cpp-python")
            continue
        settings = cards.about.results[model].variant or VariantSettings() if model in VARIANTS else VariantSettings()
        lacks = missing_packages(model, settings.packing)
        for number, code in enumerate(programs(ours), 1):
            if lacks and not _uses_tunepress(code):
                yield unknown("snippets", model, f"not run with stock libraries: needs {' and '.join(lacks)}")
                continue
            place.tell(0, 1, f"{model}: running snippet {number}")
            yield _run(model, code, place)


def _others(claims: Claims, model: str) -> Finding:
    """Return the finding about other snippets: a defect only if this version wrote the card."""
    made_with, own = claims.made_with.get("tunepress"), own_version()
    if made_with == own:
        return wrong("snippets", model, "not run: they do not follow from the lineage")
    return unknown("snippets", model, f"not run: other code than that of tunepress {own}: made with {made_with}")


def card_of(claims: Claims, model: str) -> str:
    """Return the path of the card with a model's snippets."""
    return CARD if model == ROOT or claims.mirror_of else f"{VARIANTS[model].folder}/{CARD}"


def of_model(about: About, claims: Claims, model: str) -> list[str]:
    """Return the code blocks about one model."""
    blocks = snippets.blocks(rendered(about, claims)[card_of(claims, model)])
    if model != ROOT:
        return blocks
    loads = [block for block in blocks if _assigns(block, "model")]  # the root's comes first
    return [*loads[:1], *(block for block in blocks if block not in loads)]


def programs(blocks: list[str]) -> list[str]:
    """Return programs: each block that loads a model, followed by the blocks that use it."""
    loads = [block for block in blocks if _assigns(block, "model")]
    uses = [block for block in blocks if not _assigns(block, "model")]
    return ["\n".join([load, *(uses if _assigns(load, "tokenizer") else ())]) for load in loads]


def _assigns(code: str, name: str) -> bool:
    targets = (target for node in ast.parse(code).body if isinstance(node, ast.Assign) for target in node.targets)
    return any(isinstance(n, ast.Name) and n.id == name for target in targets for n in ast.walk(target))


def _uses_tunepress(code: str) -> bool:
    return "from pipeline import load" in code


def _run(model: str, code: str, place: Place) -> Finding:
    with_tunepress = _uses_tunepress(code)
    means = "with tunepress" if with_tunepress else "with stock libraries"
    with tempfile.TemporaryDirectory(prefix="tunepress-snippet-") as folder:
        try:
            done = snippets.run(code, Path(folder), with_tunepress, seconds=SECONDS)
        except subprocess.TimeoutExpired:
            return unknown("snippets", model, f"{means}: not finished within {SECONDS // 60} minutes")
    if done.returncode < 0:
        return unknown("snippets", model, f"{means}: killed (signal {-done.returncode}), perhaps out of memory")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return wrong("snippets", model, f"{means}: does not run: {last}")
    return right("snippets", model, f"{means}: runs")
