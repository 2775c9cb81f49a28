"""Results -> the model card, the variant cards, and their one picture.

Every figure in a card is read from `results.json` or the configuration and passes
through a format of `pipeline.markdown`; what was not measured is left out. The words
are in `templates/`, where nothing but markdown and escaped text can be printed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import markdown
from pipeline.catalog import VARIANTS
from pipeline.config import PACKAGE_SOURCE, REPO_ID, Config
from pipeline.markdown import Markdown, code, escape, estimate, listed, number, one_line, size, table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

START, END = "<!-- tunepress:start -->", "<!-- tunepress:end -->"
PLOT = Markdown("assets/quality_vs_size.png")
ROOT = "merged"  # the key of the root model in the results
TEXTS = {"held_out": "held-out", "general": "general"}
LOADERS = {"pipeline.load": "`pipeline.load`", "stock": "stock"}
_BUILTIN = {
    "builtin:python-docs": "docstrings of Python's standard library",
    "builtin:python-topics": "topics of Python's language reference",
}


@dataclass(frozen=True)
class About:
    """What a card is about.

    Attributes:
        name: the title.
        location: what the snippets load: `user/model`, or a folder's path.
        config: the configuration of the run.
        results: the content of `results.json`; any key may be missing.
    """

    name: str
    location: str
    config: Config
    results: dict

    def get(self, *keys: str) -> Any:
        """A value in the results, or None where it was not measured."""
        found: Any = self.results
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found


def model_card(about: About, variants: Sequence[str]) -> str:
    """README.md of a repository that holds the root model and exactly these variants."""
    models = {"base": Markdown("base model"), ROOT: Markdown("root"), **_folders(variants)}
    more = {"plot": PLOT} if _points(about, variants) else {}
    return _render("model_card.md.jinja", about, models, _metadata(about, ROOT, variants), **more)


def variant_card(about: About, variant: str) -> str:
    """README.md in one variant's folder."""
    models = {ROOT: Markdown("root"), **_folders([variant])}
    return _render("variant_card.md.jinja", about, models, _metadata(about, variant), variant=variant)


def plot_quality(about: About, variants: Sequence[str], path: Path) -> bool:
    """Draw perplexity against size, one panel for each text, with standard errors.

    Returns:
        False if there is nothing to plot; then no file is written.
    """
    panels = _points(about, variants)
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (text, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, stored, value, error in points:
            axes.errorbar(stored / 1e6, value, yerr=error, fmt="o", capsize=4)
            axes.annotate(label, (stored / 1e6, value), xytext=(7, 5), textcoords="offset points")
        axes.set(xlabel="size of the weights, MB", ylabel="perplexity", title=f"{TEXTS[text]} text")
        axes.margins(x=0.2, y=0.2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path, metadata={"Software": None})
    return True


def _render(template: str, about: About, models: dict[str, Markdown], metadata: ModelCardData, **more: Any) -> str:
    from huggingface_hub import ModelCard

    seen = [n for row in about.get("training", "history") or () if (n := number(row.get("num_tokens")))]
    body = (
        markdown.environment(_templates(), source=_source)
        .get_template(template)
        .render(
            name=about.name,
            location=str(about.location),
            question=next(iter(about.config.evaluate.prompts), "What can you do?"),
            config=about.config,
            results=about.results,
            variants=[m for m in models if m in VARIANTS],
            base=_base(about),
            reasons=[line for _, line in _reasons(about, models).values()],
            **{f.__name__[1:]: f(about, models) for f in (_quality, _differences, _faded, _speed, _machines, _answers)},
            tokens_seen=markdown.count(max(seen, default=None)),
            **more,
        )
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n{START}\n{body}\n{END}\n"))


def _templates() -> Path:
    """The folder of templates, in a clone and in an installed wheel alike."""
    here = Path(__file__).resolve().parent
    return next((f for f in (here / "templates", here.parent / "templates") if f.is_dir()), here / "templates")


def _metadata(about: About, subject: str, variants: Sequence[str] = ()) -> ModelCardData:
    """The front matter about one model of the results; license and language only as base and data say them."""
    from huggingface_hub import ModelCardData

    base, source = about.get("training", "base") or {}, about.get("data", "source")
    parent = one_line(base.get("hub_id") or "") if subject == ROOT else about.location
    known = REPO_ID.fullmatch(parent) if subject == ROOT else _on_hub(parent)
    languages = [one_line(w) for w in (*(base.get("languages") or ()), about.get("data", "language")) if w]
    licensed = one_line(base.get("license") or "").lower()
    folders = [v for v in (subject, *variants) if v in VARIANTS]
    method = [about.config.train.method] if about.get("training") else []
    measured = _eval_results(about, subject)
    return ModelCardData(
        base_model=parent if known else None,
        base_model_relation=("finetune" if subject == ROOT else "quantized") if known else None,
        datasets=[source] if _on_hub(source) else None,
        language=list(dict.fromkeys(w for w in languages if re.fullmatch("[a-z]{2,3}", w))) or None,
        license=licensed if re.fullmatch(r"[\w.+-]+", licensed) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tunepress", *method, *(VARIANTS[v].format for v in folders), *folders],
        model_name=one_line(about.name) if measured else None,
        eval_results=measured or None,
    )


def _eval_results(about: About, model: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    found = []
    for text, name in TEXTS.items():
        if measured := markdown.rounded(about.get(model, "quality", text, "perplexity")):
            source = one_line(about.get(model, "quality", text, "text") or name)
            source = source if source in _BUILTIN or _on_hub(source) else Path(source).name
            data = {"dataset_type": source, "dataset_name": f"{source}, {name} text", "dataset_config": name}
            metric = {"metric_type": "perplexity", "metric_value": round(measured[0], measured[2])}
            found.append(EvalResult(task_type="text-generation", **data, **metric))
    return found


def _base(about: About) -> Markdown:
    """The base model, with where it can be found; of a folder on someone's disk only its name."""
    base = about.get("training", "base") or {}
    source = base.get("source") or about.config.model.source
    if REPO_ID.fullmatch(hub := base.get("hub_id") or ""):
        revision = f" at revision {code(base['revision'][:12])}" if base.get("revision") else ""
        return Markdown(f"[{escape(hub)}](https://huggingface.co/{hub}){revision}")
    if package := PACKAGE_SOURCE.match(source):
        place = f"{code(package[2])} of the Python package {code(package[1])}"
    else:
        place = f"the local folder {code(Path(source).name)}"
    return Markdown(f"{escape(base['name'])} ({place})" if base.get("name") else place)


def _source(source: str) -> Markdown:
    """Where a text or a data set comes from; of a file on someone's disk only its name."""
    if source in _BUILTIN:
        return Markdown(f"{_BUILTIN[source]} ({code(source)})")
    if _on_hub(source):
        return Markdown(f"[{escape(source)}](https://huggingface.co/datasets/{source})")
    return Markdown(f"the file {code(Path(source).name)}")


def _on_hub(source: str | None) -> bool:
    return bool(source and REPO_ID.fullmatch(source) and not Path(source).exists())


def _folders(variants: Sequence[str]) -> dict[str, Markdown]:
    return {v: code(f"{VARIANTS[v].folder}/") for v in variants}


def _quality(about: About, models: dict[str, Markdown]) -> Markdown:
    rows = []
    for model, label in models.items():
        stored, ratio = size(about.get(model, "size_bytes")), markdown.share(about.get(model, "ratio"))
        weights = Markdown(f"{stored}, {ratio} of the root") if stored and ratio else stored
        rows.append([label, weights, *(estimate(about.get(model, "quality", t, "perplexity")) for t in TEXTS)])
    return table(["", "Weights", *(f"Perplexity, {name} text" for name in TEXTS.values())], rows)


def _differences(about: About, models: dict[str, Markdown]) -> Markdown:
    rows = []
    for model, label in models.items():
        for text, name in TEXTS.items():
            rise, kl, agreement = (about.get(model, "quality", text, k) for k in ("rise", "kl", "agreement"))
            figures = [estimate(rise, percent=True, sign="+"), estimate(kl), estimate(agreement, percent=True)]
            rows.append([Markdown(f"{label}, {name} text"), *figures])
    return table(["Against the root", "Rise of perplexity", "KL divergence, nats a token", "Same first choice"], rows)


def _speed(about: About, models: dict[str, Markdown]) -> Markdown:
    columns = {
        "decode_tokens_per_second": ("Writing, tokens/s", markdown.decimal),
        "prefill_tokens_per_second": ("Reading, tokens/s", markdown.decimal),
        "peak_memory_bytes": ("Peak memory", size),
    }
    reasons, rows = _reasons(about, models), []
    for model, label in models.items():
        row = [label]
        for figure, (_, form) in columns.items():
            for loader in LOADERS:
                known = reasons.get((model, loader))
                row.append(known[0] if known else form(about.get(model, "speed", loader, figure)))
        rows.append(row)
    return table(["", *(f"{title}, {shown}" for title, _ in columns.values() for shown in LOADERS.values())], rows)


def _reasons(about: About, models: dict[str, Markdown]) -> dict[tuple[str, str], tuple[Markdown, Markdown]]:
    """(model, loader) that loads but does not run -> the mark in its cells, and the line that explains it."""
    found: dict[tuple[str, str], tuple[Markdown, Markdown]] = {}
    for model, label in models.items():
        for loader, shown in LOADERS.items():
            if about.get(model, "speed", loader, "runs") is False:
                mark, reason = f"({chr(ord('a') + len(found))})", about.get(model, "speed", loader, "reason") or ""
                why = f"could not run it: {code(reason[:160] or 'no reason given')}"
                if "mslk" in reason:
                    why = "cannot compute with it: the kernel for that is in the package `mslk`, for CUDA"
                line = f"{mark} The {shown} loader loads {label}, but on the machine that measured {why}."
                found[model, loader] = Markdown(f"— {mark}"), Markdown(line)
    return found


def _machines(about: About, models: dict[str, Markdown]) -> list[Markdown]:
    """The machines that measured, each once; which model on which, where there are several."""
    used: dict[str, list[str]] = {}
    for model, label in models.items():
        if machine := about.get(model, "machine"):
            cores, memory = markdown.count(machine.get("cores")), size(machine.get("memory_bytes"))
            known = [machine[k] for k in ("gpu", "cpu", "cpu_capability") if machine.get(k)]
            known += [f"{cores} cores"] * bool(cores) + [f"{memory} of memory"] * bool(memory)
            used.setdefault(listed(known), []).append(label)
    return [Markdown(m if len(used) == 1 else f"{listed(who)} on {m}") for m, who in used.items()]


def _answers(about: About, models: dict[str, Markdown]) -> list[tuple[str, list[tuple[Markdown, str]]]]:
    """(prompt, [(who, answer)]), with those who said the same together."""
    found: dict[str, dict[str, list[str]]] = {}
    for model, label in models.items():
        for sample in about.get(model, "answers") or ():
            prompt, answer = sample.get("prompt"), sample.get("answer")
            if isinstance(prompt, str) and isinstance(answer, str):
                found.setdefault(prompt, {}).setdefault(answer, []).append(label)
    return [(prompt, [(listed(who), said) for said, who in by.items()]) for prompt, by in found.items()]


def _faded(about: About, models: dict[str, Markdown]) -> list[Markdown]:
    """The variants whose loss on held-out text is nearer to the base model's than to the root's."""
    loss = {m: number(about.get(m, "quality", "held_out", "loss", "value")) or 0 for m in ("base", ROOT, *models)}
    middle = (loss["base"] + loss[ROOT]) / 2
    known = 0 < loss[ROOT] < loss["base"]
    return [label for m, label in models.items() if known and m in VARIANTS and loss[m] > middle]


def _points(about: About, variants: Sequence[str]) -> dict[str, list[tuple[str, float, float, float | None]]]:
    """Text -> (label, bytes, perplexity, standard error) of the root and at least one variant."""
    panels = {}
    for text in TEXTS:
        points = []
        for model in (ROOT, *variants):
            measured = markdown.rounded(about.get(model, "quality", text, "perplexity"))
            if measured and (stored := number(about.get(model, "size_bytes"))):
                points.append(("root" if model == ROOT else model, stored, measured[0], measured[1]))
        if len(points) > 1 and points[0][0] == "root":
            panels[text] = points
    return panels
