"""The verbs that take any model: `merge`, `quantize`, `sensitivity` and `chat`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import RUNS, AsJson, Remove, Replace, Root, Settings, console, terminal_reporter
from pipeline.cli.runs import conclude, run_stage
from pipeline.config.calibration import QUALITIES
from pipeline.config.catalog import DEFAULT_VARIANTS, ROUNDINGS, VARIANTS
from pipeline.config.presets import PRESETS

if TYPE_CHECKING:
    from pipeline.config.schema import Config

Output = Annotated[Path | None, typer.Option("--output", help="New folder for the release.")]
_VARIANTS_HELP = (
    f"{', '.join(VARIANTS)}; or a set of them: both ({' and '.join(DEFAULT_VARIANTS)}), {', '.join(PRESETS)}. "
    "Separate several with commas."
)
Variants = Annotated[str | None, typer.Option("--variants", help=_VARIANTS_HELP)]
Measure = Annotated[bool, typer.Option("--measure", help="Load back and measure the result; publishing always does.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the model on the Hub.")]


def merge(
    source: Annotated[str, typer.Argument(metavar="CONFIG|BASE", help="A configuration, or a base model.")],
    adapter: Annotated[str | None, typer.Argument(help="An adapter: a folder, or a Hub id.")] = None,
    output: Output = None,
    base: Annotated[str | None, typer.Option("--base", help="bf16 (default) or nf4.")] = None,
    variants: Variants = None,
    measure: Measure = False,
    revision: Revision = None,
    remove: Remove = None,
    replace: Replace = False,
    settings: Settings = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter of a run; or any adapter, with: merge BASE ADAPTER --output DIR."""
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
        return run_stage("merge", source, settings, runs, as_json, remove=remove, replace=replace)
    from pipeline.config.builders import merge_config
    from pipeline.errors import ConfigError

    if adapter is None or output is None:
        raise ConfigError(f"merge {source}: arguments are missing. Try: merge BASE ADAPTER --output DIR")
    asked = [variants] if variants else []
    config = merge_config(source, adapter, output, base or "auto", asked, measure, revision, settings or ())
    _run_into(output, config, as_json, remove, replace)


def quantize(
    source: Annotated[str, typer.Argument(metavar="CONFIG|MODEL", help="A configuration, or any model.")],
    output: Output = None,
    variants: Variants = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="32, 64, 128 or 256, for int4; for int8 if it is the only variant."),
    ] = None,
    rounding: Annotated[str | None, typer.Option("--rounding", help=f"{', '.join(ROUNDINGS)}.")] = None,
    packing: Annotated[
        str | None, typer.Option("--packing", help="How codes are stored: tile_packed (int4), torchao (fp8).")
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            "--quality",
            help=f"{', '.join(QUALITIES)}: each loses less and takes longer (default with a text: the second).",
        ),
    ] = None,
    calibration_text: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration-text",
            metavar="FILE|ID",
            help="Text to calibrate on: a file, a data set on the Hub, builtin:python-docs, or general (the "
            "part of the general text that is not measured); repeatable.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="KEY=VALUE",
            help="What int4 must reach: rise=0.03, size_mb=500 or bits=4.8; needs a text.",
        ),
    ] = None,
    measure: Measure = False,
    revision: Revision = None,
    low_disk: Annotated[
        bool,
        typer.Option("--low-disk", help="Download one shard after the other, and remove each after reading it."),
    ] = False,
    remove: Remove = None,
    replace: Replace = False,
    settings: Settings = None,
    runs: Root = RUNS,
    as_json: AsJson = False,
) -> None:
    """Quantize the variants of a run; or of any model, with: quantize MODEL --output DIR."""
    given = {
        "variants": variants,
        "group_size": group_size,
        "rounding": rounding,
        "packing": packing,
        "target": target,
    }
    if _is_config(source):
        others = {"measure": measure or None, "revision": revision, "low_disk": low_disk or None}
        texts = {"quality": quality, "calibration_text": calibration_text}
        _refuse(source, output=output, **others, **given, **texts)
        return run_stage("quantize", source, settings, runs, as_json, remove=remove, replace=replace)
    from pipeline.config.builders import calibration_settings, quantize_config, read_target
    from pipeline.errors import ConfigError

    named = [name for name, value in given.items() if value is not None]
    if named and any(setting.startswith("quantize.variants") for setting in settings or ()):
        raise ConfigError(
            f"--{named[0].replace('_', '-')}: given together with --set quantize.variants. Try: only one of them"
        )
    if output is None:
        raise ConfigError(f"quantize {source}: no folder for the release. Try: --output DIR")
    calibrated = calibration_settings(quality, calibration_text or (), targeted=target is not None)
    config = quantize_config(
        source,
        output,
        [variants or "both"],
        group_size,
        rounding,
        measure,
        revision,
        [*(f"{key}={json.dumps(value)}" for key, value in calibrated.items()), *(settings or ())],
        packing,
        low_disk,
        read_target(target) if target else None,
    )
    _run_into(output, config, as_json, remove, replace)


def sensitivity(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, or a folder.")],
    variant: Annotated[
        str, typer.Option("--variant", help="Variant that each layer is quantized to.")
    ] = DEFAULT_VARIANTS[-1],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the results (default: NAME-sensitivity).")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of general text.", min=256)] = 2048,
    revision: Revision = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure each linear layer's share of the loss of a quantized model, and check the largest ones."""
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
        alone = layer.get("checked")
        shown = f", {alone['kl']['value']:.2e} if this layer alone is quantized" if alone else ""
        print(f"{layer['name']:<40} {layer['kl']['value']:.2e} nats a token{shown}")
    print(f"All {len(found['layers'])} layers: {output}/sensitivity.json, with a picture beside it")


def chat(
    model: Annotated[
        str, typer.Argument(help="A repository USER/NAME, a run such as runs/demo, or a folder with a model.")
    ],
    variant: Annotated[
        str | None, typer.Option(help="int8, int4, gguf-q4_0, ... (default: the full-precision model).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
) -> None:
    """Chat with a model. An empty line, Ctrl-D or Ctrl-C ends the chat."""
    from pipeline.cli.chat import chat as talk

    talk(model, variant, device, new_tokens, console())


def _run_into(output: Path, config: Config, as_json: bool, remove: list[str] | None, replace: bool) -> None:
    from pipeline.workflow.kept_variants import removal
    from pipeline.workflow.run import run as run_all

    reporter = terminal_reporter(as_json)
    workspace = run_all(config, reporter=reporter, output=output, removal=removal(remove or (), replace))
    conclude(workspace.config(), workspace, as_json, reporter)


def _is_config(source: str) -> bool:
    """Return True if an argument is a YAML file or a shipped recipe, and not a model."""
    from pipeline.config.loader import shipped_configs

    return source.endswith((".yaml", ".yml")) or (source in shipped_configs() and not Path(source).is_dir())


def _refuse(config: str, **options: object) -> None:
    """Raise ConfigError if options for a model are given with a configuration."""
    from pipeline.errors import ConfigError

    given = next((name for name, value in options.items() if value is not None), None)
    if given:
        raise ConfigError(
            f"{config}: a configuration, so --{given.replace('_', '-')} does not apply. Try: --set KEY=VALUE"
        )
