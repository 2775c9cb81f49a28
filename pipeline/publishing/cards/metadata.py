"""The YAML at the top of a card, which the Hub reads.

The measured figures are in `model-index`. The Hub's newer form, `.eval_results/*.yaml`, is not written. Each of its
entries names a benchmark that is registered on the Hub, and perplexity on a run's own text belongs to none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.catalog import TRANSFORMERS, VARIANTS, is_one_file
from pipeline.config.schema import REPO_ID
from pipeline.evaluation.model_result import TEXTS
from pipeline.publishing.cards import markdown
from pipeline.publishing.cards.about import ROOT, About
from pipeline.publishing.cards.front_matter import SOURCE
from pipeline.publishing.cards.markdown import one_line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# The names that the Hub accepts; it refuses a card with another one.
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0
    lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""


def metadata(about: About, models: Sequence[str], whole: bool = False) -> ModelCardData:
    """Return the metadata of a card.

    Args:
        models: the models of the card, by their keys in the results.
        whole: True for the card of the whole release, whose first model is the merged model.
    """
    from huggingface_hub import ModelCardData

    parent, relation = _parent(about, whole)
    origin, data = about.results.origin, about.results.data
    languages = [one_line(w) for w in (*origin.languages, data and data.language) if w]
    variants = [model for model in models if model in VARIANTS]
    named = models[1:] if whole else models if len(models) > 1 else ()
    method = [about.config.train.method] if about.results.training else []
    measured = [r for model in models for r in _measured(about, model, model in named)]
    loads = any(not is_one_file(model) for model in models if model != ROOT or about.reference == ROOT)
    return ModelCardData(
        base_model=parent,
        base_model_relation=relation if parent else None,
        datasets=about.data_repos or None,
        language=list(dict.fromkeys(w for w in languages if re.fullmatch("[a-z]{2,3}|code", w))) or None,
        **_license(about),
        library_name=TRANSFORMERS if loads else VARIANTS[variants[0]].format,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["tunepress", *method, *(VARIANTS[v].format for v in variants), *variants])),
        model_name=one_line(about.name) if measured else None,
        eval_results=measured or None,
    )


def _parent(about: About, whole: bool) -> tuple[str | None, str]:
    """Return the parent model, if it is on the Hub, and the relation to it."""
    name = one_line(about.results.origin.hub_id or "")
    base = name if REPO_ID.fullmatch(name) and not (whole and about.is_guest) else None
    if about.reference != ROOT:
        return base, "quantized"
    return (base, "finetune") if whole else (about.repo, "quantized")


def _license(about: About) -> dict[str, Any]:
    """Return the license in the Hub's form: the configured one, or the base model's; empty if neither is known."""
    origin, known = about.results.origin, _LICENSES.split()
    if (chosen := about.config.publish.license) and about.license_conflict:
        return {"license": chosen} if chosen in known else {"license": "other", "license_name": chosen}
    name = one_line(origin.license or chosen or "").lower()
    if name == "other":
        more = {"license_name": origin.license_name, "license_link": origin.license_link}
        return {"license": name, **{key: one_line(value) for key, value in more.items() if value}}
    if name in known:
        return {"license": name}
    several = name.split(", ")
    if set(several) <= set(known):
        return {"license": several}
    name = "-and-".join(several)
    return {"license": "other", "license_name": name} if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) else {}


def _measured(about: About, model: str, named: bool) -> list[EvalResult]:
    """Return the perplexities of one model, with its name if `named`."""
    from huggingface_hub import EvalResult

    found = []
    for text, name in TEXTS.items():
        quality = about.results[model].on(text)
        if measured := markdown.rounded(quality.perplexity):
            source = about.public_name(one_line(quality.text or name))
            data: dict[str, Any] = {
                "dataset_type": source,
                "dataset_name": f"{source}, {name} text",
                "dataset_config": name,
            }
            metric: dict[str, Any] = {"metric_type": "perplexity", "metric_value": round(measured[0], measured[2])}
            if named:
                metric["metric_name"] = f"perplexity of {model}"
            if about.repo:
                url = f"https://huggingface.co/{about.repo}/blob/main/tunepress.json"
                metric |= {"source_name": SOURCE, "source_url": url}
            found.append(EvalResult(task_type="text-generation", **data, **metric))
    return found
