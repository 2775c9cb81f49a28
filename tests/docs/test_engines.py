"""The table of engines in docs/ is the one that the catalogue gives."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.config.catalog import VARIANTS
from pipeline.config.engines import ENGINES, FULL_PRECISION, GENERATIONS, Runs, tell
from tests.support import REPOSITORY

PAGE = REPOSITORY / "docs" / "formats-and-where-they-run.md"


def table() -> str:
    """The table of engines, as markdown; variants that run alike share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, ways in _ways():
        cells = ["; ".join(words for words, _ in tell(ways, engine, ())) or "no" for engine in ENGINES]
        rows.setdefault((*cells, _layers(ways)), []).append(name)
    lines = [["variants", *(engine.label for engine in ENGINES.values()), "layers that fit"]]
    lines += [["---"] * len(lines[0]), *([", ".join(names), *cells] for cells, names in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ways() -> Iterable[tuple[str, tuple[Runs, ...]]]:
    yield "main model", FULL_PRECISION
    for name, variant in VARIANTS.items():
        yield f"`{name}`", variant.ways()
        for packing in list(variant.packings)[1:]:
            yield f"`{name}` as `{packing}`", variant.ways(packing)


def _layers(ways: Iterable[Runs]) -> str:
    """The multiples that a kernel needs: `SGLang on CUDA: columns 128, rows 64`."""
    found: dict[str, None] = {}
    for way in ways:
        if multiples := [f"{key} {n}" for key, n in (("columns", way.columns), ("rows", way.rows)) if n > 1]:
            found[f"{ENGINES[way.engine].label} on {way.hardware}: {', '.join(multiples)}"] = None
    return "; ".join(found) or "all"


def test_table_of_engines_is_up_to_date():
    assert table() in PAGE.read_text(encoding="utf-8"), f"put this table there:\n{table()}"


def test_generations_of_cards_are_explained():
    text = PAGE.read_text(encoding="utf-8")
    used = {way.capability for _, ways in _ways() for way in ways if way.capability in GENERATIONS}
    assert [f"{GENERATIONS[number]} {number:.1f}" in text for number in sorted(used)] == [True] * len(used)
