"""The cards of a release, of each folder of variants in it, and of each mirror.

Every figure comes from `results.json` or the configuration, through a format of
`pipeline.publishing.cards.markdown`. A figure that was not measured is left out. The words are in `templates/`,
which can print only markdown and escaped text.

There are three kinds of release: a model fine-tuned here, one with an adapter that was trained elsewhere, and
variants only. The last has no merged model, and is compared with its source. In the repository of its source, its
card is a section of that model's card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.config.catalog import DATA_FORMS, EIGHT_BITS, LLAMA_CPP, ROUNDINGS, VARIANTS, is_one_file
from pipeline.config.schema import PACKAGE_SOURCE
from pipeline.config.training_catalog import METHODS, TRAINERS
from pipeline.evaluation.data_result import Data, DataPart
from pipeline.evaluation.model_result import TEXTS
from pipeline.evaluation.results import Training
from pipeline.inference.loaders import TIMED
from pipeline.publishing.cards import about as names
from pipeline.publishing.cards import markdown
from pipeline.publishing.cards.about import ROOT, About
from pipeline.publishing.cards.engines import commands, engines, loaded_alike, packages
from pipeline.publishing.cards.markdown import Markdown, code, escape, listed, number, one_line
from pipeline.publishing.cards.metadata import metadata
from pipeline.publishing.cards.own_text import END, START, note
from pipeline.publishing.cards.plot import PLOT, plot_quality, points
from pipeline.publishing.cards.tables import Models, tables
from pipeline.publishing.ollama import MODELFILE, default_variant
from pipeline.system.resources import shipped_folder

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_HEADING = re.compile(r"(?P<block>^(`{3,})\w*\n.*?\n\2$)|^(?=#+ )", re.DOTALL | re.MULTILINE)
_BLANKS = re.compile(r"(?P<block>^(`{3,})\w+\n.*?\n\2$)|\n{3,}", re.DOTALL | re.MULTILINE)

ADAPTER = "adapter"  # the folder of the adapter in a release

__all__ = [
    "ADAPTER", "END", "PLOT", "START", "About",
    "adapter_card", "folder_card", "mirror_card", "model_card", "plot_quality",
]  # fmt: skip


def model_card(about: About, variants: Sequence[str]) -> str:
    """Return the README.md of a repository with the merged model, if there is one, and exactly these variants."""
    front = metadata(about, [ROOT, *variants], whole=True)
    if about.is_guest:
        return _render("model_card.md.jinja", about, about.models(variants), front, above=f"# {escape(about.name)}\n\n")
    more: dict[str, Any] = {"plot": PLOT if points(about, variants) else None, "mirrors": _links(about.mirrors)}
    return _render("model_card.md.jinja", about, about.models(variants), front, **more)


def folder_card(about: About, variants: Sequence[str]) -> str:
    """Return the README.md in the folder of one or several variants."""
    more: dict[str, Any] = {"subject": VARIANTS[variants[0]].folder, "mirrors": _links(about.mirrors)}
    models = about.models(variants, with_base=False)
    return _render("folder_card.md.jinja", about, models, metadata(about, variants), **more)


def mirror_card(about: About, variant: str, repo: str) -> str:
    """Return the README.md of a repository `repo` that holds one variant alone."""
    front = metadata(replace(about, name=repo), [variant])
    models = about.models([variant], with_base=False) | {variant: code(variant)}
    more: dict[str, Any] = {
        "subject": variant,
        "title": repo,
        "snippets_from": repo,
        "snippets_on_hub": True,
        "at_root": True,
    }
    return _render("mirror_card.md.jinja", about, models, front, **more)


def adapter_card(about: About) -> str:
    """Return the README.md in the folder of an adapter whose base is in no repository."""
    from huggingface_hub import ModelCardData

    source = about.results.origin.source or about.config.model.source
    more: dict[str, Any] = {
        "subject": ADAPTER,
        "from_package": Markdown(one_line(source)) if PACKAGE_SOURCE.match(source) else None,
        "adapter_from": Markdown(about.repo or "."),
        "is_published": about.repo is not None,
    }
    front = ModelCardData(library_name="peft", tags=["tunepress"])
    return _render("adapter_card.md.jinja", about, about.models((), with_base=False), front, **more)


def _render(template: str, about: About, models: Models, front: ModelCardData, above: str = "", **more: Any) -> str:
    """Return a card.

    Args:
        above: text before our section, whose headings are then one level deeper.
    """
    made = markdown.environment(shipped_folder("templates"))
    history = (about.results.training or Training()).history
    seen = [n for row in history if (n := number(row.get("num_tokens")))]
    prompts = about.config.evaluate.prompts if about.config.evaluate else []
    variants = [m for m in models if m in VARIANTS]
    files = {v: about.files[v] for v in variants if v in about.files}
    given = {
        "name": about.name,
        "title": about.name,
        "home": about.home,
        "snippets_from": str(about.location),
        "snippets_on_hub": about.repo is not None,
        "chats": about.chats,
        "question": next(iter(prompts), "What can you do?"),
        "config": about.config,
        "results": about.results,
        "guest": about.is_guest,
        "kind": "variants" if about.reference != ROOT else "trained" if about.config.data else "adapter",
        "reference": about.reference,
        "description": markdown.paragraphs(about.config.publish.description or ""),
        "license_conflict": about.license_conflict,
        "models": models,
        "variants": variants,
        "packed": [v for v in variants if not is_one_file(v)],
        "packages": packages(about, [v for v in variants if not is_one_file(v)]),
        "loaded_alike": loaded_alike(about, [v for v in variants if not is_one_file(v)]),
        "in_one_file": [v for v in variants if is_one_file(v)],
        "quantizes": any(VARIANTS[v].bits < 16 for v in variants),
        "catalog": VARIANTS,
        "methods": METHODS,
        "has_adapter": about.config.has_adapter,
        "trainers": TRAINERS,
        "roundings": {name: Markdown(rounding.said) for name, rounding in ROUNDINGS.items()},
        "eight_bits": EIGHT_BITS,
        "llama_cpp": LLAMA_CPP,
        "loaders": list(TIMED),
        "types": {v: Markdown(VARIANTS[v].file_type or "") for v in variants},
        "folders": {v: Markdown(VARIANTS[v].folder) for v in variants},
        "files": files,
        "default": default_variant(files) if files else None,
        "modelfile": MODELFILE,
        "base": names.model_source(about.results.origin, about.config.model.source),
        "adapter": names.model_source(about.results.adapter, about.config.merge.adapter),
        "is_on_hub": bool(about.results.origin.hub_id),
        "data_is_on_hub": bool(about.data_repos),
        "is_requantized": _is_requantized(about),
        "tokens_seen": markdown.count(max(seen, default=None)),
        "data": _data(about),
        "text_source": about.text_source,
        "texts": TEXTS,
        "clustered": any(found.clusters for m in about.results.models.values() for found in m.quality.values()),
        **tables(about, models),
    }
    given |= more
    told = {model: name for model, name in models.items() if model in variants or "subject" not in more}
    given["where"] = engines(about, told)
    given["served"] = commands(
        about, told, given["snippets_from"], given["snippets_on_hub"], given.get("at_root", False)
    )
    body = made.get_template(template).render(**given)
    body = _BLANKS.sub(lambda found: found["block"] or "\n\n", body).strip()
    if above:
        body = _HEADING.sub(lambda found: found["block"] or "#", body)
    written = front.to_yaml()
    return f"---\n{written}\n---\n{above}{START}\n{body}\n\n{note(written)}\n{END}\n"


def _data(about: About) -> dict[str, Any]:
    """Return the known facts about the training data, with its names in words."""
    known, columns = about.results.data or Data(), about.config.data.columns if about.config.data else {}
    forms = DATA_FORMS | {"builtin": "conversations made from what Python brings along"}
    templates = {"supplied": "supplied by tunepress, since the base model has none"}
    form, template = known.form, known.template
    asked = about.config.data
    return dict(known) | {
        "parts": listed((_part(about, part) for part in known.parts.values()), "; "),
        "weights": listed(
            Markdown(f"{about.text_source(rows.source)} {rows.weight:g}") for rows in (asked.sources if asked else ())
        ),
        "options": listed(
            code(f"{name}: {json.dumps(value)}") for name, value in (asked.template_options if asked else {}).items()
        ),
        "validation": about.text_source(asked.validation.source) if asked and asked.validation else None,
        "source": about.text_source(about.data_source) if about.data_source else None,
        "pairs": about.text_source(known.preference.source or "") if known.preference else None,
        "form": listed((Markdown(forms[f]) if f in forms else code(f) for f in (form or "").split(" and ") if f), "; "),
        "template": templates.get(template or "", template),
        "revision": code(known.revision[:12]) if known.revision else None,
        "columns": listed(Markdown(f"{code(ours)} from {code(theirs)}") for ours, theirs in columns.items()),
        "unused": listed(code(column) for column in known.unused_columns),
    }


def _part(about: About, part: DataPart) -> Markdown:
    """Return one of several sources of the data in words."""
    told = [about.text_source(part.source or "")]
    told += [Markdown(f"subset {code(part.subset)}")] if part.subset else []
    told += [Markdown(f"split {code(part.split)}")] if part.split else []
    told += [Markdown(f"revision {code(part.revision[:12])}")] if part.revision else []
    return listed([*told, Markdown(f"{markdown.count(part.rows)} rows")])


def _links(mirrors: Mapping[str, str]) -> dict[str, Markdown]:
    return {variant: names.link(repo) for variant, repo in mirrors.items()}


def _is_requantized(about: About) -> bool:
    return (about.results.origin.source or about.config.model.source).lower().endswith(".gguf")
