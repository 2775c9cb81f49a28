"""The verbs that take any model: what is made of it, and talking to it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import RUNS, AsJson, Root, Settings, console, terminal_reporter
from pipeline.cli.runs import conclude, run_stage
from pipeline.config.catalog import DEFAULT_VARIANTS

if TYPE_CHECKING:
    from pipeline.config.schema import Config

Output = Annotated[Path | None, typer.Option("--output", help="A new folder, which becomes the release.")]
Variants = Annotated[str | None, typer.Option("--variants", help="int8, int4, both; several with commas.")]
Measure = Annotated[bool, typer.Option("--measure", help="Load back and measure; publishing does so in any case.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model on the Hub.")]


def merge(
    source: Annotated[str, typer.Argument(metavar="CONFIG|BASE", help="A run's configuration, or a base model.")],
    adapter: Annotated[str | None, typer.Argument(help="An adapter trained elsewhere: a folder, or a Hub id.")] = None,
    output: Output = None,
    base: Annotated[str | None, typer.Option("--base", help="Merge into bf16 (the default), or nf4.")] = None,
    variants: Variants = None,
    measure: Measure = False,
    revision: Revision = None,
    settings: Settings = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Only merge the run's adapter; or merge an adapter from elsewhere: merge BASE ADAPTER --output DIR."""
    if _is_config(source):
        _refuse(
            source,
            adapter=adapter,
            output=output,
            base=base,
            variants=variants,
            revision=revision,
            measure=measure or None,
        )
        return run_stage("merge", source, settings, runs, as_json)
    from pipeline.config.builders import merge_config
    from pipeline.errors import ConfigError

    if adapter is None or output is None:
        raise ConfigError(f"merge {source}: write it as merge BASE ADAPTER --output DIR, or merge CONFIG.yaml")
    asked = [variants] if variants else []
    _run_midway(
        merge_config(source, adapter, output, base or "auto", asked, measure, revision, settings or ()), output, as_json
    )


def quantize(
    source: Annotated[str, typer.Argument(metavar="CONFIG|MODEL", help="A run's configuration, or any model.")],
    output: Output = None,
    variants: Variants = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="32, 64, 128 or 256, for int4 (int8 if alone).")
    ] = None,
    rounding: Annotated[str | None, typer.Option("--rounding", help="search, hqq or rtn.")] = None,
    packing: Annotated[str | None, typer.Option("--packing", help="plain, or tile_packed for CUDA; for int4.")] = None,
    measure: Measure = False,
    revision: Revision = None,
    low_disk: Annotated[
        bool,
        typer.Option("--low-disk", help="Fetch shard by shard, and remove each when it was read."),
    ] = False,
    settings: Settings = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Only make the run's variants; or those of any model: quantize MODEL --output DIR --variants int8,int4."""
    given = {"variants": variants, "group_size": group_size, "rounding": rounding, "packing": packing}
    if _is_config(source):
        _refuse(source, output=output, measure=measure or None, revision=revision, low_disk=low_disk or None, **given)
        return run_stage("quantize", source, settings, runs, as_json)
    from pipeline.config.builders import quantize_config
    from pipeline.errors import ConfigError

    told = [name for name, value in given.items() if value is not None]
    if told and any(setting.startswith("quantize.variants") for setting in settings or ()):
        raise ConfigError(f"--{told[0].replace('_', '-')} and --set quantize.variants: say it in one way")
    if output is None:
        raise ConfigError(f"quantize {source}: say where to, with --output DIR, or name a configuration (.yaml)")
    config = quantize_config(
        source, output, [variants or "both"], group_size, rounding, measure, revision, settings or (), packing, low_disk
    )
    _run_midway(config, output, as_json)


def sensitivity(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, or a folder.")],
    variant: Annotated[str, typer.Option("--variant", help="How a layer is quantized.")] = DEFAULT_VARIANTS[-1],
    output: Annotated[
        Path | None, typer.Option("--output", help="A folder for figures and picture; by default NAME-sensitivity.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Of general text, for every layer.", min=256)] = 2048,
    revision: Revision = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure what quantizing each linear layer alone costs; goes on where it was stopped."""
    from pipeline.config.builders import quantize_config
    from pipeline.config.schema import MeasuredRun
    from pipeline.errors import ConfigError
    from pipeline.evaluation.sensitivity import report

    output = output or Path(f"{Path(source).name}-sensitivity")
    asked = [f"evaluate.max_tokens={tokens}", *(settings or ())]
    config = quantize_config(source, output, [variant], measure=True, revision=revision, settings=asked)
    if not isinstance(config, MeasuredRun):
        raise ConfigError("evaluate: null, so nothing is measured. Try: leave out --set evaluate=null")
    reporter, start = terminal_reporter(as_json), time.monotonic()
    reporter.started("sensitivity")
    found = report(config, output, reporter.progress)
    reporter.wrote("sensitivity", time.monotonic() - start)
    if as_json:
        print(json.dumps(found))
        return
    for layer in sorted(found["layers"], key=lambda layer: -layer["kl"]["value"])[:10]:
        print(f"{layer['name']:<40} KL {layer['kl']['value']:.2e} ± {layer['kl']['stderr']:.0e} nats a token")
    print(f"All {len(found['layers'])} layers: {output}/sensitivity.json, and a picture beside it")


def chat(
    model: Annotated[str, typer.Argument(help="A repository USER/NAME, a run such as runs/demo, or a model's folder.")],
    variant: Annotated[str | None, typer.Option(help="int8, int4, gguf-q4_0, ...; without it the full model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
) -> None:
    """Talk to a model. Ends with an empty line, Ctrl-D or Ctrl-C."""
    from pipeline.cli.chat import chat as talk

    talk(model, variant, device, new_tokens, console())


def _run_midway(config: Config, output: Path, as_json: bool) -> None:
    from pipeline.workflow.run import run as run_all

    reporter = terminal_reporter(as_json)
    workspace = run_all(config, reporter=reporter, output=output)
    conclude(config, workspace, as_json, reporter)


def _is_config(source: str) -> bool:
    """Is a verb's argument a configuration (a YAML file, or a shipped recipe), and not a model?"""
    from pipeline.config.loader import shipped_configs

    return source.endswith((".yaml", ".yml")) or (source in shipped_configs() and not Path(source).is_dir())


def _refuse(config: str, **options: object) -> None:
    """Options for a model do not change what a configuration says."""
    from pipeline.errors import ConfigError

    given = next((name for name, value in options.items() if value is not None), None)
    if given:
        raise ConfigError(f"{config}: is a configuration, which says {given.replace('_', ' ')} itself; use --set")
