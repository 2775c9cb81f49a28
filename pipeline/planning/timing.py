"""How long stages take on a machine that was measured; sizes times its figures, and no more exact than that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pipeline.config.catalog import DEFAULT_VARIANTS, NEAREST, VARIANTS
from pipeline.config.schema import Config, MeasuredRun, TrainingRun, VariantSpec
from pipeline.config.training_catalog import METHODS, NF4_BASE
from pipeline.evaluation.texts import FEWEST_TOKENS
from pipeline.planning.benchmark import Calibration
from pipeline.planning.model import Sizes
from pipeline.planning.stages import Stage
from pipeline.training.trainers import merge_bases

HELD_OUT_SHARE = 0.5  # of the tokens that are measured on at most, for there is often less held-out text
PROBED_TOKENS = (4 * 256, 4 * 32)  # that a probe reads, and writes
ANSWER_TOKENS = 64


def seconds(
    found: Calibration, config: Config, sizes: Sizes, stages: Sequence[Stage], steps: int | None
) -> dict[str, float]:
    """Seconds of each stage but those of the network; a stage is left out where its time is not known."""
    specs = {spec.name: spec for spec in config.quantize.variants}
    times = {}
    for stage in stages:
        if stage.untimed:
            continue
        if stage.name == "train" and steps is not None and isinstance(config, TrainingRun):
            times["train"] = _training(found, config, sizes, steps)
        elif stage.name == "merge":
            times["merge"] = _merging(found, config, sizes, stage)
        elif stage.name == "evaluate" and isinstance(config, MeasuredRun):
            models = 2 if config.merges else 1
            times["evaluate"] = found.start_seconds + models * _measured(found, config, sizes, sizes.bf16_bytes, 1)
        elif stage.name == "quantize":
            times["quantize"] = found.start_seconds + _rounding(found, sizes, specs.values()) + _written(found, stage)
        elif stage.name in specs and isinstance(config, MeasuredRun):
            loaders = 1 if VARIANTS[stage.name].is_one_file else 2
            stored = stage.reads["variant"]
            times[stage.name] = found.start_seconds + _measured(found, config, sizes, stored, loaders)
    return times


def _training(found: Calibration, config: TrainingRun, sizes: Sizes, steps: int) -> float:
    train = config.train
    tokens = train.batch_size * train.max_length
    weights = sizes.linear_parameters + sizes.vocabulary * sizes.hidden
    step = tokens * weights / found.train
    if METHODS[train.method].in_nf4:
        step += 2 * sizes.linear_parameters / found.nf4_weights
    measured = 1 + steps // train.evaluate_every
    held_out = HELD_OUT_SHARE * config.evaluate.max_tokens * weights / found.forward
    loop = steps * train.accumulate * step + measured * held_out
    return 2 * found.start_seconds + min(loop, 60 * (train.max_minutes or math.inf))


def _merging(found: Calibration, config: Config, sizes: Sizes, stage: Stage) -> float:
    bases = merge_bases(config)
    time = found.start_seconds + _written(found, stage)
    if NF4_BASE in bases:
        time += 2 * sizes.linear_parameters / found.nf4_bytes
    if len(bases) == 1 or not isinstance(config, MeasuredRun):
        return time + _rounding(found, sizes, config.quantize.variants)
    return time + 3 * _scored(found, sizes, HELD_OUT_SHARE * config.evaluate.max_tokens, compared=True)


def _rounding(found: Calibration, sizes: Sizes, specs: Iterable[VariantSpec]) -> float:
    return sum(2 * sizes.linear_parameters / _rate(found, spec) for spec in specs)


def _rate(found: Calibration, spec: VariantSpec) -> float:
    """Bytes a second; GGUF's grids are as much work as ours of as many bits."""
    eight, four = DEFAULT_VARIANTS
    if spec.rounding is None:
        return found.rounding[f"{eight}/{NEAREST}"]
    kind = eight if spec.variant.bits == VARIANTS[eight].bits else four
    known = found.rounding.get(f"{kind}/{spec.rounding}")
    return known or found.rounding[f"{four}/{VARIANTS[four].roundings[0]}"]


def _written(found: Calibration, stage: Stage) -> float:
    return (sum(stage.writes.values()) + sum(stage.temporary.values())) / found.disk_write


def _measured(found: Calibration, config: MeasuredRun, sizes: Sizes, weights: int, loaders: int) -> float:
    """Both texts scored and compared, answers, and a probe for each loader."""
    texts = 1 + HELD_OUT_SHARE if config.data else 1
    time = _scored(found, sizes, texts * config.evaluate.max_tokens, compared=True)
    if config.evaluate.max_minutes:
        least = _scored(found, sizes, texts * min(FEWEST_TOKENS, config.evaluate.max_tokens), compared=True)
        time = max(least, min(time, 60 * config.evaluate.max_minutes))
    token = weights / found.decode_bytes
    read, written = PROBED_TOKENS
    probe = found.start_seconds + read * sizes.linear_parameters / found.forward + written * token
    return time + len(config.evaluate.prompts) * ANSWER_TOKENS * token + loaders * probe


def _scored(found: Calibration, sizes: Sizes, tokens: float, compared: bool) -> float:
    head = sizes.vocabulary * sizes.hidden
    return tokens * (sizes.linear_parameters / found.forward + head * (3 if compared else 1) / found.exact)
