"""The report of a plan, as JSON and as a page of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.data.system_prompt import describe_prompt, prompt_in
from pipeline.planning import memory
from pipeline.planning.engines import places, tell_places
from pipeline.planning.plan import Plan, Shortage
from pipeline.planning.stages import Stage, disk_peaks
from pipeline.system.text_format import clock, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNMEASURED_GPU = "GPU memory comes from formulas that were not compared with a GPU; leave some room"


def as_json(plan: Plan) -> dict:
    """Return the plan as plain data: bytes, seconds, parameters."""
    config, data, peaks = plan.config, plan.data, dict(disk_peaks(plan.stages))
    model = ("revision", "parameters", "linear_parameters", "bf16_bytes", "fetched_bytes", "here_bytes")
    return {
        "name": config.name,
        "model": {"source": config.model.source, **_values(plan.model, *model)},
        "adapter_parameters": plan.adapter_parameters,
        "data": data
        and {
            "source": config.data and config.data.named,
            **_values(data, "examples", "tokens", "how", "fetched_bytes"),
            "steps": plan.steps,
            **({"preference_steps": plan.second_steps} if config.train.preference else {}),
        },
        "machine": _values(plan.machine, "name", "gpu_bytes", "host_bytes", "disk_free", "cache_free"),
        "stages": [_stage(stage, peaks[stage.name], plan.seconds.get(stage.name)) for stage in plan.stages],
        **_values(plan, "disk_bytes", "fetched_bytes", "cached_bytes", "uploaded_bytes"),
        "seconds": plan.total_seconds,
        "fits": plan.fits,
        "shortages": [vars(shortage) for shortage in plan.shortages],
        "changes": [vars(change) | {"setting": change.setting} for change in plan.changes],
        "runs_on": {variant: [vars(place) for place in at] for variant, at in places(config, plan.model).items()},
        "notes": list(_notes(plan)),
    }


def _values(of: object, *names: str) -> dict:
    return {name: getattr(of, name) for name in names}


def _stage(stage: Stage, disk: int, seconds: float | None) -> dict:
    return {
        "stage": stage.name,
        "fetched_bytes": stage.fetches,
        "cached_bytes": stage.caches,
        "reads": dict(stage.reads),
        "writes": dict(stage.writes),
        "temporary": dict(stage.temporary),
        "uploaded_bytes": stage.uploads,
        "memory": dict(stage.host),
        "memory_bytes": memory.total(stage.host),
        "gpu_memory": dict(stage.gpu),
        "gpu_memory_bytes": memory.total(stage.gpu),
        "disk_bytes": disk,
        "seconds": seconds,
        "notes": list(stage.notes),
    }


def show(console: Console, plan: Plan) -> None:
    """Print the plan as a page of text."""
    from rich.markup import escape

    for label, line in _head(plan):
        console.print(f"[bold]{label:<8}[/]{escape(line)}")
    console.print(_table(plan))
    for stage in plan.stages:
        for kind, need in (("memory", stage.host), ("GPU memory", stage.gpu)):
            if need:
                parts = ", ".join(f"{part} {size(count)}" for part, count in need.items() if count)
                console.print(f"[dim]{stage.name}, {kind}: {escape(parts)}[/]")
    console.print()
    for line in _notes(plan):
        console.print(f"[dim]{escape(line)}[/]")
    for line in _verdict(plan):
        console.print(line)


def _head(plan: Plan) -> Iterator[tuple[str, str]]:
    model, data, machine, config = plan.model, plan.data, plan.machine, plan.config
    places = {"hub": f"{size(model.fetched_bytes)} on the Hub", "folder": f"{size(model.file_bytes)} in a folder"}
    came = places.get(model.kind, f"{size(model.file_bytes)} in a package")
    if model.here_bytes:
        came += f", {size(model.here_bytes)} of it in the cache"
    yield "Run", config.name
    yield (
        "Model",
        f"{config.model.source}: {_count(model.parameters)} parameters, {size(model.bf16_bytes)} in bf16; {came}",
    )
    if plan.adapter_parameters:
        yield "Adapter", f"{_count(plan.adapter_parameters)} parameters"
    if config.data and data:
        rows = "an unknown number of examples" if data.examples is None else f"about {data.examples} examples"
        tokens = "" if data.tokens is None else f", about {_count(data.tokens)} tokens"
        taken = "steps not known" if plan.steps is None else f"{plan.steps} steps"
        yield "Data", f"{config.data.named}: {rows}{tokens} ({data.how}); {taken}"
    if second := config.train.preference:
        taken = "steps not known" if plan.second_steps is None else f"{plan.second_steps} steps"
        yield "Pairs", f"{second.data.named}: {taken} with {second.trainer}, after these"
    free = " free" if machine.is_here else ""
    has = [f"{size(machine.gpu_bytes)} of GPU memory{free}"] if machine.has_gpu else []
    has += [f"{size(machine.host_bytes)} of memory free" if machine.host_bytes else "main memory not known"]
    has += [f"{size(machine.disk_free)} of disk free" if machine.disk_free is not None else "disk not known"]
    yield "On", f"{machine.name}: {', '.join(has)}"


def _table(plan: Plan) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    has_gpu = plan.machine.has_gpu
    for column in ("", "download", "reads", "writes", "temporary", "upload", "memory", "GPU", "time"):
        if column != "GPU" or has_gpu:
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for stage in plan.stages:
        sums = (
            stage.fetches,
            sum(stage.reads.values()),
            sum(stage.writes.values()),
            sum(stage.temporary.values()),
            stage.uploads,
            memory.total(stage.host),
            *([memory.total(stage.gpu)] if has_gpu else []),
        )
        took = plan.seconds.get(stage.name)
        table.add_row(stage.name, *(size(count) if count else "-" for count in sums), clock(took) if took else "-")
    return table


def _notes(plan: Plan) -> Iterator[str]:
    disk = f"disk: {size(plan.disk_bytes)} at most in the run's folder"
    yield disk + (f", {size(plan.cached_bytes)} more in the Hub's cache" if plan.cached_bytes else "")
    if plan.uploaded_bytes:
        how = "during the run" if plan.config.publish.commits == "per_stage" else "at the end"
        yield f"upload to {plan.config.publish.repo}: {size(plan.uploaded_bytes)}, {how}; later only changed files"
    for stage in plan.stages:
        for note in stage.notes:
            yield f"{stage.name}: {note}"
    yield from tell_places(plan.config, plan.model)
    if said := tell_system_prompt(plan):
        yield f"system prompt: {said}"
    if plan.data and plan.data.fetched_bytes is None:
        yield "data: the size of the download is not known"
    yield plan.why_no_times or f"time: {tell_time(plan)}, from the measured speed of this machine"
    if plan.machine.has_gpu:
        yield UNMEASURED_GPU
    if plan.machine.has_gpu and plan.machine.host_bytes is None:
        yield "main memory and disk of that machine are not known"


def tell_system_prompt(plan: Plan) -> str | None:
    """Return the system prompt that only the chat template adds, in words; None if there is none."""
    asked, data = plan.config.data, plan.data
    if asked is None or data is None or data.without_system == 0:
        return None
    if asked.system is not None or asked.chat_template is not None:
        return None
    prompt = prompt_in(plan.model.chat_template or "")
    return describe_prompt(prompt, False, data.without_system, data.examples) if prompt else None


def tell_time(plan: Plan) -> str:
    """Return the time and what it leaves out, or the reason for no time: `about 3:20, without the network`."""
    if plan.why_no_times:
        return plan.why_no_times
    without = [*(f"{stage}, {why}" for stage, why in plan.untimed.items()), "the network"]
    return f"about {clock(sum(plan.seconds.values()))}, without {', and without '.join(without)}"


def tell_shortage(short: Shortage) -> str:
    """Return a shortage in words: `train: not enough GPU memory (needs 9.1 GB, has 8.0 GB)`."""
    return f"{short.stage}: not enough {short.what} (needs {size(short.need)}, has {size(short.have)})"


def _verdict(plan: Plan) -> Iterator[str]:
    from rich.markup import escape

    if plan.fits:
        yield "[green]fits[/]"
        return
    for short in plan.shortages:
        yield f"[red]does not fit[/]  {tell_shortage(short)}"
    if not plan.changes:
        yield "No known settings make it fit. Try: a smaller model, or a larger machine"
        return
    yield "It fits with these changes:"
    for change in plan.changes:
        yield f"  --set {escape(change.setting)}   [dim]{escape(change.why)}[/]"


def _count(number: int) -> str:
    """Return a number as people write it: `135 M`."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)
