"""The tables of a card, and the statements that follow from them.

`models` is the result of `About.models`: the models of the card and their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config.catalog import VARIANTS, is_one_file
from pipeline.config.presets import place_of
from pipeline.evaluation.cluster_errors import MARGIN, quantile
from pipeline.evaluation.model_result import HELD_OUT, TEXTS, Quality, Speed
from pipeline.evaluation.results import BASE
from pipeline.inference.loaders import TIMED
from pipeline.publishing.cards import markdown
from pipeline.publishing.cards.about import ROOT, About
from pipeline.publishing.cards.engines import fitting_ways
from pipeline.publishing.cards.markdown import Markdown, code, estimate, listed, number, size, table
from pipeline.publishing.cards.verdicts import ladders, ladders_in_vain, missed, withheld

Models = dict[str, Markdown]
LOADERS = {loader: Markdown(phrase) for loader, phrase in TIMED.items()}
MANY = 3  # more than a sentence can hold
_AHEAD = 0.95  # a model leads in speed or memory if the next one is further behind than runs differ


def summary(about: About, models: Models) -> Markdown:
    """Return a table of size, quality, speed and memory, with one row for each model."""
    text = next((t for t in TEXTS if t in about.results[about.reference].quality), HELD_OUT)
    ours = models[about.reference]
    rows = []
    for model, name in models.items():
        result = about.results[model]
        quality, fast = result.on(text), result.fastest or Speed()
        rows.append(
            [
                Markdown(f"**{name}**") if model in (about.reference, *VARIANTS) else name,
                size(result.size_bytes),
                markdown.share(result.ratio),
                estimate(quality.perplexity),
                estimate(quality.kl),
                estimate(quality.agreement, percent=True),
                markdown.decimal(fast.decode_tokens_per_second),
                size(fast.peak_memory_bytes),
            ]
        )
    measured = ("Perplexity", "KL divergence", "Same first choice", "Tokens per second", "Peak memory")
    return table(["", "Weights", f"Of the {ours}", *measured], rows)


def advice(about: About, models: Models) -> Markdown:
    """Return what each folder of a release is for, in the words of one sentence.

    Of many folders for the same engines, those that miss their limits are left to the table.
    """
    ahead, over = leads(about, models), {name for name, _ in missed(about, models)}
    reference = models[about.reference]
    phrases: dict[str, dict[str, Markdown]] = {}  # by the engines that folders are for
    for variant in (model for model in models if model in VARIANTS):
        row, folder = VARIANTS[variant], code(f"{VARIANTS[variant].folder}/")
        more = [
            markdown.said("{} of the size", markdown.share(about.results[variant].ratio)),
            *ahead[variant],
            Markdown("it misses its limits, see below") if models[variant] in over else None,
        ]
        told = f" ({listed(more)})" if not row.is_one_file and listed(more) else ""
        phrases.setdefault(place_of(variant, fitting_ways(about, variant)), {}).setdefault(
            row.folder, Markdown(f"{folder}{told}")
        )
    chosen = []
    good = {VARIANTS[model].folder for model, name in models.items() if model in VARIANTS and name not in over}
    for engines, names in phrases.items():
        within = [phrase for folder, phrase in names.items() if folder in good]
        *first, last = within if within and len(names) > MANY else names.values()
        chosen.append(Markdown(f"{listed([listed(first), last], ' or ')} for {engines}"))
    if about.reference == ROOT or about.is_guest:
        top = Markdown(f"the files at the top of this repository (the {reference}) for full precision or more training")
    else:
        top = Markdown(f"the {reference} itself for full precision")
    return Markdown(f"Take {'; '.join(chosen)}; or {top}." if chosen else f"Take {top}.")


def quality(about: About, models: Models) -> list[tuple[str, Markdown]]:
    """Return (text, table of quality) for each text that was measured on."""
    ours = models[about.reference]
    headers = ["", "Perplexity", f"Rise over the {ours}", "KL divergence, nats a token", "Same first choice"]
    found = []
    for text in TEXTS:
        rows = []
        for model, name in models.items():
            q = about.results[model].on(text)
            rise, agreement = estimate(q.rise, percent=True, sign="+"), estimate(q.agreement, percent=True)
            rows.append([name, estimate(q.perplexity), rise, estimate(q.kl), agreement])
        if shown := table(headers, rows):
            found.append((text, shown))
    return found


def speed(about: About, models: Models) -> Markdown:
    """Return a table of speed and memory, with one row for each model and loader."""
    reasons, rows = failures(about, models), []
    for model, name in models.items():
        for loader, shown in LOADERS.items():
            probe = about.results[model].speed.get(loader) or Speed()
            seconds = (probe.load_seconds, probe.prefill_tokens_per_second, probe.decode_tokens_per_second)
            figures = [*map(markdown.decimal, seconds), size(probe.peak_memory_bytes)]
            if mark := reasons.get((model, loader)):
                known = 0 if probe.load_seconds is None else 1
                figures = [*figures[:known], *[mark[0]] * (len(figures) - known)]
            rows.append([Markdown(f"{name}, {shown}"), *figures])
    return table(
        ["", "Loading, seconds", "Reading, tokens per second", "Writing, tokens per second", "Peak memory"], rows
    )


def failures(about: About, models: Models) -> dict[tuple[str, str], tuple[Markdown, Markdown]]:
    """Return the mark in the table and its explanation by (model, loader) that does not run."""
    found: dict[tuple[str, str], tuple[Markdown, Markdown]] = {}
    for model, name in models.items():
        for loader, shown in LOADERS.items():
            probe = about.results[model].speed.get(loader) or Speed()
            if probe.runs is False:
                mark, reason = f"({chr(ord('a') + len(found))})", probe.reason or ""
                why = f"could not run it: {code(reason[:160] or 'no reason given')}"
                if "mslk" in reason:
                    why = "cannot compute with it: the kernel for that is in the package `mslk`, for CUDA"
                why = f"loads {name}, but on the machine that measured {why}"
                if probe.load_seconds is None:
                    why = f"was not tried with {name} on the machine that measured: {code(reason)}"
                if probe.lacks:
                    why = f"did not open {name}, because it needs {listed(map(code, probe.lacks), ' and ')}, and the "
                    why += "machine that measured lacks that"
                line = f"{mark} {str(shown)[0].upper()}{shown[1:]} {why}."
                found[model, loader] = Markdown(f"— {mark}"), Markdown(line)
    return found


def leads(about: About, models: Models) -> dict[str, list[Markdown]]:
    """Return the titles by model: in what it is clearly ahead of all others in the release."""
    release = [m for m in models if m != BASE]
    fast = {m: about.results[m].fastest or Speed() for m in release}
    loads: dict[str, dict[str, float | None]] = {
        "smallest to download": {m: about.results[m].size_bytes for m in release},
        "smallest in memory": {m: fast[m].peak_memory_bytes for m in release},
        "fastest at writing": {m: _inverse(fast[m].decode_tokens_per_second) for m in release},
        "fastest at reading": {m: _inverse(fast[m].prefill_tokens_per_second) for m in release},
    }
    found: dict[str, list[Markdown]] = {m: [] for m in release}
    if len(machines(about, {m: models[m] for m in release})) > 1:
        loads = dict(list(loads.items())[:1])  # figures of different machines are not comparable
    for title, values in loads.items():
        order = sorted((v, m) for m, value in values.items() if (v := number(value)) is not None)
        if len(order) == len(release) > 1 and order[0][0] < _AHEAD * order[1][0]:
            found[order[0][1]].append(Markdown(title))
    if nearest := _nearest(about, [m for m in release if m in VARIANTS]):
        found[nearest].append(Markdown(f"closest to the {models[about.reference]}"))
    return found


def _nearest(about: About, variants: list[str]) -> str | None:
    """Return the variant with the smallest divergence on every text, by more than its error."""
    winners: set[str | None] = set()
    for text in TEXTS:
        measured = {v: markdown.rounded(about.results[v].on(text).kl) for v in variants}
        known = [(e[0], e[1] or 0, v) for v, e in measured.items() if e]
        if len(known) > 1:
            (low, error, first), (high, other, _) = sorted(known)[:2]
            reach = _reach(about.results[first].on(text))
            sure = len(known) == len(variants) and high - low > reach * (error**2 + other**2) ** 0.5
            winners.add(first if sure else None)
    return winners.pop() if len(winners) == 1 else None


def _reach(quality: Quality) -> float:
    """Return the number of errors that a difference must exceed; NaN without an error, 2 for earlier versions."""
    return MARGIN if quality.freedom is None else quantile(MARGIN, quality.freedom)


def rises(about: About, models: Models) -> dict[str, list[Markdown]]:
    """Return the rise of perplexity on each text by variant, and whether it is beyond its error."""
    found: dict[str, list[Markdown]] = {}
    for model in (m for m in models if m in VARIANTS):
        for text, name in TEXTS.items():
            rise, reach = about.results[model].on(text).rise, _reach(about.results[model].on(text))
            if known := markdown.rounded(rise, 100):
                value, error, _ = known
                sure = f" ({'beyond' if abs(value) > reach * error else 'within'} its error)" if error else ""
                shown = f"{estimate(rise, percent=True, sign='+')} on {name} text{sure}"
                found.setdefault(model, []).append(Markdown(shown))
    return found


def ways(about: About, models: Models) -> dict[str, list[Markdown]]:
    """Return memory and speed with each loader by model."""
    found: dict[str, list[Markdown]] = {}
    for model in models:
        for loader, shown in LOADERS.items():
            probe = about.results[model].speed.get(loader) or Speed()
            memory, writing = size(probe.peak_memory_bytes), markdown.decimal(probe.decode_tokens_per_second)
            if probe.runs and memory and writing:
                of = Markdown("of GPU memory" if probe.device == "cuda" else "of memory")
                found.setdefault(model, []).append(Markdown(f"{memory} {of} and {writing} tokens/s with {shown}"))
    return found


def machines(about: About, models: Models) -> list[Markdown]:
    """Return the machines that measured, with their models if there are several machines."""
    used: dict[str, list[Markdown]] = {}
    for model, name in models.items():
        if machine := about.results[model].machine:
            cores, memory = markdown.count(machine.cores), size(machine.memory_bytes)
            known = [name for name in (machine.gpu, machine.cpu, machine.cpu_capability) if name]
            known += [f"{cores} cores"] * bool(cores) + [f"{memory} of memory"] * bool(memory)
            if dtype := about.results[model].compute_dtype:
                known.append(f"computed in {dtype}")
            used.setdefault(listed(known), []).append(name)
    return [Markdown(m if len(used) == 1 else f"{listed(who)} on {m}") for m, who in used.items()]


def answers(about: About, models: Models) -> list[tuple[str, list[tuple[Markdown, str]]]]:
    """Return (prompt, [(models, answer)]); models with the same answer are together."""
    found: dict[str, dict[str, list[str]]] = {}
    for model, name in models.items():
        for sample in about.results[model].answers:
            if sample.prompt is not None and sample.answer is not None:
                found.setdefault(sample.prompt, {}).setdefault(sample.answer, []).append(name)
    return [(prompt, [(listed(who), said) for said, who in by.items()]) for prompt, by in found.items()]


def faded(about: About, models: Models) -> list[Markdown]:
    """Return the variants whose loss on held-out text is nearer to the base model's than to the merged model's."""
    measured = {m: about.results[m].on(HELD_OUT).loss for m in (BASE, ROOT, *models)}
    loss = {m: number(found.value) or 0 if found else 0 for m, found in measured.items()}
    middle = (loss[BASE] + loss[ROOT]) / 2
    known = 0 < loss[ROOT] < loss[BASE]
    return [name for m, name in models.items() if known and m in VARIANTS and loss[m] > middle]


def read_by(about: About, models: Models) -> dict[str, list[Markdown]]:
    """Return the variants that are one file, by the loader that measured their quality."""
    found: dict[str, list[Markdown]] = {}
    for model, name in models.items():
        result = about.results[model]
        if is_one_file(model) and result.loader and result.quality:
            found.setdefault(result.loader, []).append(name)
    return found


def offloaded(about: About, models: Models) -> list[Markdown]:
    """Return the models whose weights stayed in their files while they were measured."""
    return [name for model, name in models.items() if about.results[model].offloaded]


def tables(about: About, models: Models) -> dict[str, Any]:
    """Return the results of all these functions by name, for the templates."""
    makers: tuple[Callable[[About, Models], Any], ...]
    makers = (summary, quality, speed, leads, rises, ways, machines, answers, faded, failures, offloaded, read_by)
    makers += (advice, missed, withheld, ladders, ladders_in_vain)
    return {maker.__name__: maker(about, models) for maker in makers}


def _inverse(value: float | None) -> float | None:
    return 1 / known if (known := number(value)) else None
