"""The section of a card that says where each model runs, and how to fetch and serve it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.config.catalog import EIGHT_BITS, VARIANTS, is_one_file
from pipeline.config.engines import ENGINES, FETCH, FULL_PRECISION, ONLY_STORED, Runs, tell
from pipeline.evaluation.model_result import StoredWeights, VariantSettings
from pipeline.publishing.cards.about import ROOT, About, place
from pipeline.publishing.cards.markdown import Markdown, code, listed, shell_word, table

NOT_OPENED = Markdown("no")


def ways_of(about: About, model: str) -> tuple[Runs, ...]:
    """Return the ways in which engines run a model of a release."""
    if model not in VARIANTS:
        return FULL_PRECISION
    return VARIANTS[model].ways((about.results[model].variant or VariantSettings()).packing)


def _layers(about: About, model: str) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Return the shapes of the quantized layers of a model, and True if experts are among them."""
    stored = about.results[model].weights or StoredWeights()
    return stored.shapes, bool(stored.experts)


def fitting_ways(about: About, model: str) -> list[Runs]:
    """Return the ways in which engines run a model of a release, and whose kernels take its layers."""
    return [way for way in ways_of(about, model) if not way.misfit(*_layers(about, model))]


def engines(about: About, models: Mapping[str, Markdown]) -> dict[str, Any]:
    """Return the table of models and engines, the notes on it, and the commands, for the templates."""
    ours = {model: name for model, name in models.items() if model in VARIANTS or model == ROOT}
    used = [name for name in ENGINES if any(way.engine == name for model in ours for way in ways_of(about, model))]
    marks: dict[str, str] = {}  # a reason -> its mark in the table
    rows: dict[tuple[Markdown, ...], list[Markdown]] = {}  # models that run in the same way share a row
    for model, name in ours.items():
        cells = tuple(_cell(about, model, engine, marks) for engine in used)
        rows.setdefault(cells, []).append(name)
    return {
        "table": table(
            ["", *(ENGINES[name].label for name in used)],
            [[listed(names), *cells] for cells, names in rows.items()],
            align=":---",
        ),
        "notes": [(Markdown(mark), Markdown(why)) for why, mark in marks.items()],
        "not_opened": NOT_OPENED if any(NOT_OPENED in cells for cells in rows) else None,
        "only_stored": ONLY_STORED if any(ONLY_STORED in cell for cells in rows for cell in cells) else None,
    }


def _cell(about: About, model: str, engine: str, marks: dict[str, str]) -> Markdown:
    """Return how an engine runs a model: `CPU, CUDA with torchao`."""
    parts = []
    for words, misfit in tell(ways_of(about, model), engine, *_layers(about, model)):
        mark = marks.setdefault(misfit, f"({chr(ord('a') + len(marks))})") if misfit else ""
        parts.append(Markdown(f"not on {words} {mark}" if misfit else words))
    return listed(parts, "; ") or NOT_OPENED


def packages(about: About, variants: Sequence[str]) -> dict[Markdown, Markdown]:
    """Return the packages that transformers needs to open variants: packages -> the variants that need them."""
    found: dict[Markdown, list[Markdown]] = {}
    for variant in variants:
        made = about.results[variant].variant or VariantSettings()
        if needed := VARIANTS[variant].opened_with(made.packing):
            found.setdefault(listed(map(code, needed), " and "), []).append(place(variant))
    return {needed: listed(names) for needed, names in found.items()}


def loaded_alike(about: About, variants: Sequence[str]) -> list[list[str]]:
    """Return groups of variants that the same code loads, except for the name."""
    groups: dict[tuple, list[str]] = {}
    for variant in variants:
        made = about.results[variant].variant or VariantSettings()
        row = VARIANTS[variant].packing(made.packing) or VARIANTS[variant]
        groups.setdefault((row.snippet, row.usage, made.embeddings == EIGHT_BITS), []).append(variant)
    return list(groups.values())


def commands(
    about: About, models: Mapping[str, Markdown], top: str, on_hub: bool, at_root: bool
) -> list[tuple[Markdown, Markdown]]:
    """Return (name, shell commands) of the models that a command serves; they fetch its files first if they must.

    Args:
        top: `user/model`, or the path of the release's folder.
        on_hub: True if `top` is a repository.
        at_root: True if the files of the only variant are at the root of `top`, as in a mirror.
    """
    found = []
    for model, name in models.items():
        if model == ROOT or model in VARIANTS:
            lines = dict.fromkeys(_commands(about, model, top, on_hub, at_root))
            found += [(name, Markdown("\n".join(lines)))] if lines else []
    return found


def _commands(about: About, model: str, top: str, on_hub: bool, at_root: bool) -> Iterator[str]:
    folder = "" if at_root or model == ROOT else VARIANTS[model].folder
    mirror, target = about.mirrors.get(model), about.config.name
    fetches = on_hub and folder and not mirror
    path = mirror or "/".join(filter(None, (f"./{target}" if fetches else top, folder)))
    file = f"{path}/{about.files.get(model, '')}"
    words = {"repo": shell_word(top), "folder": shell_word(path), "file": shell_word(file)}
    words["type"] = Markdown(VARIANTS[model].file_type or "") if model in VARIANTS else Markdown("")
    for way in fitting_ways(about, model):
        engine = ENGINES[way.engine]
        template = engine.from_hub if on_hub and is_one_file(model) else engine.serve
        opens_folder = "{folder}" in template
        if not way.computes or not template or opens_folder == is_one_file(model):
            continue
        if fetches and opens_folder:
            yield FETCH.format(repo=words["repo"], files=shell_word(f"{folder}/*"), target=shell_word(target))
        yield template.format(**words, flags=way.flags)
