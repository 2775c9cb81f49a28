"""The variants of a run's last release, which stay in the next one unless a person agrees to remove them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.calibration import FAST_QUALITY, QUALITIES
from pipeline.config.catalog import VARIANTS, resolve_listed, variant_names
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.evaluation.results import Results
from pipeline.publishing.removal import Removal
from pipeline.workflow.workspace import HIDDEN, Workspace


def removal(variants: Collection[str] = (), others: bool = False, adapter: bool = False) -> Removal:
    """Return the removals that options ask for; `variants` may be separated by commas.

    Raises:
        ConfigError: for an unknown variant.
    """
    try:
        names = resolve_listed(variants)
    except KeyError as unknown:
        raise ConfigError(f"--remove {unknown.args[0]}: not a variant. Try: {variant_names()}") from None
    return Removal(tuple(dict.fromkeys(names)), others, adapter)


def with_kept_variants(
    config: Config, workspace: Workspace, agreed: Removal, tell: Callable[[list[str]], None]
) -> tuple[Config, Removal]:
    """Return the configuration of the next release, and all removals that were agreed since the last publish.

    It also names the variants of the last release, with their former settings, and it lacks the removed ones. If the
    release is in a folder that an option names, what was measured there stays measured.

    Args:
        config: the configuration that is asked for.
        workspace: the run's folder, which may not exist yet.
        agreed: the removals that are asked for now.
        tell: receives lines for people.

    Raises:
        ConfigError: if no variant would be left, or a variant would lose its calibration.
        WorkspaceError: if the last release is of another model, or has a merged model and the next one has none.
    """
    config = _without(config, agreed.variants)
    asked = [spec.name for spec in config.quantize.variants]
    if not workspace.folder.is_dir():
        return config, agreed
    ledger = workspace.read_ledger()
    both = agreed.after(ledger.removal, asked)
    released = [key.partition("/")[2] for key in ledger.done() if key.startswith("quantize/") and workspace.placed(key)]
    kept = [v for v in VARIANTS if v in released and v not in asked and v not in both.variants]
    if not (both.others or config.merges) and "merge" in ledger.done():
        raise WorkspaceError(
            f"{workspace.release}: has a merged model, which would be lost. Try: another folder or name, or --replace"
        )
    is_measured_less = config.evaluate is None and workspace.folder.name == HIDDEN
    if both.others or not released or not (kept or is_measured_less):
        return config, both
    former = workspace.config()
    if _model(former) != _model(config):
        if not kept:
            return config, both
        raise WorkspaceError(
            f"{workspace.release}: has {', '.join(kept)} of another model ({_model(former)}), which would be lost. "
            "Try: another folder or name, or --replace"
        )
    changes: dict[str, Any] = {}
    quality, results = config.quantize.quality, Results.read(workspace.results_path)
    for variant in kept:
        made = weights.quality if (weights := results[variant].weights) else FAST_QUALITY
        if QUALITIES.index(quality) < QUALITIES.index(made):
            raise ConfigError(
                f"{workspace.release}: has {variant}, which was {made} and would be made again with quality {quality}. "
                f"Try: --set quantize.quality={made}, with the same calibration text, or --remove {variant}"
            )
    aimed = [variant for variant in kept if variant in former.quantize.targeted]
    if aimed and not (config.quantize.calibration.sources or config.data):
        raise ConfigError(
            f"{workspace.release}: has {', '.join(aimed)}, whose target needs the calibration text it was chosen with. "
            f"Try: --set quantize.calibration.source=TEXT, or --remove {aimed[0]}"
        )
    if kept:
        options = " ".join(f"--remove {variant}" for variant in kept)
        tell([f"{', '.join(kept)}: in the last release, so kept; leave out with {options}, or with --replace"])
        changes["quantize"] = _with_specs(config, former, kept, results)
        if former.publish.repo == config.publish.repo:
            mirrors = {v: m for v, m in former.publish.mirrors.items() if v in kept} | config.publish.mirrors
            changes["publish"] = config.publish.model_dump() | {"mirrors": mirrors}
    if is_measured_less and former.evaluate:
        if config.model.low_disk:
            raise ConfigError(
                f"{workspace.release}: was measured, and with --low-disk nothing is, so its figures would be lost. "
                "Try: without --low-disk, or --replace"
            )
        tell(["the last release was measured, so this one is measured too; with --replace it is not"])
        changes["evaluate"] = former.evaluate.model_dump()
    return Config.model_validate(config.model_dump() | changes), both


def note_removal(workspace: Workspace, agreed: Removal) -> None:
    """Record removals in the ledger, for the next publish."""
    if workspace.read_ledger().removal != agreed:
        workspace.update(lambda ledger: replace(ledger, removal=agreed))


def _without(config: Config, variants: Collection[str]) -> Config:
    """Return the configuration without these variants, and without their mirrors."""
    specs = [spec for spec in config.quantize.variants if spec.name not in variants]
    if len(specs) == len(config.quantize.variants):
        return config
    if not specs and not config.merges:
        raise ConfigError(f"--remove {','.join(variants)}: nothing would be left of the release. Try: keep one variant")
    mirrors = {v: m for v, m in config.publish.mirrors.items() if v not in variants}
    quantize = config.quantize.model_dump() | {"variants": [spec.model_dump() for spec in specs]}
    publish = config.publish.model_dump() | {"mirrors": mirrors}
    return Config.model_validate(config.model_dump() | {"quantize": quantize, "publish": publish})


def _with_specs(config: Config, former: Config, kept: Collection[str], results: Results) -> dict:
    """Return the section `quantize` with the kept variants, in the order of the last release."""
    asked = {spec.name: spec.model_dump() for spec in config.quantize.variants}
    before = {spec.name: spec.model_dump() for spec in former.quantize.variants}
    made = {name: variant.to_json() for name in kept if (variant := results[name].variant)}
    specs = {**before, **made, **{name: before[name] for name in kept if name in before}, **asked}
    return config.quantize.model_dump() | {
        "variants": [s for name, s in specs.items() if name in asked or name in kept]
    }


def _model(config: Config) -> str:
    """Return the base model of a configuration, and the adapter that it brings; folders by their whole paths."""
    given = filter(None, (config.model.source, config.merge.adapter))
    return " + ".join(str(Path(each).resolve()) if Path(each).is_dir() else each for each in given)
