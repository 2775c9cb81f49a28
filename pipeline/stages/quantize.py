"""Write the files of every variant asked for, in one pass over the full-precision checkpoint.

They lie in `quantized/` until `pipeline.stages.admit` has loaded and measured them.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import asdict
from pathlib import Path

from pipeline.config import Config, VariantSpec
from pipeline.errors import ModelError, QuantizationError
from pipeline.events import Events
from pipeline.files import empty_folder, replace_folder, write_json
from pipeline.libraries import versions
from pipeline.stages import Outcome
from pipeline.stages.inputs import full_model, made_from, shard_by_shard, text_depends
from pipeline.workspace import Workspace

LIBRARIES = ("torch", "torchao", "transformers")


def parameters(config: Config, variant: str | None) -> dict:
    spec = config.quantize.spec(variant)
    given = spec.model_dump(include={"group_size", "rounding", "embeddings", "packing"})
    return {k: v for k, v in given.items() if v not in (None, "keep", "plain")}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    measured = config.evaluate and {
        "evaluate": config.evaluate.model_dump(),
        "general": text_depends(config, workspace),
    }
    return {
        "specs": [config.quantize.spec(v).model_dump() for v in variants],
        "measured": measured,
        "after": made_from(config, workspace),
        "versions": versions(*LIBRARIES),
    }


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    from pipeline.models import linear_weights, refuse_other_matrices
    from pipeline.quantization.stream import quantize_checkpoint, unfit

    for name in variants:  # files of an earlier try must not be taken for these
        shutil.rmtree(workspace.quantized / name, ignore_errors=True)
    source = full_model(config, workspace, events)
    refuse_other_matrices(source)
    linear = linear_weights(source)
    wanted = [config.quantize.spec(name) for name in variants]
    tables, no_tables = _tables(source, wanted)
    specs, refused = [], {}
    for spec in wanted:
        name, problem = spec.name, unfit(spec, linear)
        if spec.embeddings == "int8":
            problem = problem or no_tables
        if problem:
            refused[name] = problem
            events.failed("quantize", name, QuantizationError(problem))
        else:
            specs.append(spec)
    partial = {spec.name: empty_folder(workspace.quantized / f"{spec.name}.partial") for spec in specs}
    made = {}
    if specs:
        with shard_by_shard(config, workspace, events, source) as passing:
            # What passes tells of its coming, which is the slower part.
            tell = functools.partial(events.progress, what="rounding and writing") if passing is None else None
            made = quantize_checkpoint(source, specs, partial, linear, tell, tables=tables, checkpoint=passing)
    for name, folder in partial.items():
        replace_folder(folder, workspace.quantized / name)
        write_json(workspace.quantized / f"{name}.json", asdict(made[name]))
    return Outcome((), {"made": list(made), "refused": refused})


def _tables(source: Path, specs: list[VariantSpec]) -> tuple[dict[str, tuple[int, int]], str | None]:
    """The embedding and the output head, where a variant has them in int8; and why that cannot be."""
    from pipeline.models import table_weights

    try:
        return (table_weights(source) if any(spec.embeddings == "int8" for spec in specs) else {}), None
    except ModelError as error:
        return {}, str(error)
