"""The needs of each stage of a configuration: disk, network and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.config.catalog import TRANSFORMERS
from pipeline.config.schema import Config, MeasuredRun, TrainingRun, VariantSpec
from pipeline.planning import memory, training_memory
from pipeline.planning.devices import Machine
from pipeline.planning.memory import Need
from pipeline.planning.model import Sizes
from pipeline.quantization.formats import is_dequantized_to_run
from pipeline.system.hardware import WEIGHTS_SHARE, compute_bytes_here
from pipeline.system.libraries import is_installed
from pipeline.training.trainers import merge_bases

CARDS = 200_000  # bytes of cards, picture and lineage
SCALES = 1 + 4 / 32  # bytes of a calibrated weight: a code, and a scale and a zero for 32 of them


@dataclass(frozen=True)
class Stage:
    """The needs of one stage, in bytes by purpose.

    Attributes:
        name: `train`, `merge`, `evaluate`, `allocate`, `calibrate`, `distill`, `quantize`, a variant's name, `publish`.
        fetches: downloads from the Hub: files of a model that the cache lacks, or all with `model.low_disk`; all of a
            data set, because its cache is not looked up.
        caches: the part of the downloads that stays in the Hub's cache.
        reads: reads from the disk.
        writes: files that stay in the run's folder.
        temporary: files that exist only during the stage.
        uploads: uploads to the Hub.
        host: main memory at its peak.
        gpu: GPU memory at its peak.
        notes: remarks for people.
        untimed: the reason that its time cannot be estimated: `which ...`.
    """

    name: str
    fetches: int = 0
    caches: int = 0
    reads: Mapping[str, int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    temporary: Mapping[str, int] = field(default_factory=dict)
    uploads: int = 0
    host: Need = field(default_factory=dict)
    gpu: Need = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    untimed: str | None = None


def stages_of(config: Config, sizes: Sizes, machine: Machine, data_bytes: int | None, adapter: int) -> list[Stage]:
    """Return the stages in the order of `pipeline.workflow.run`.

    Args:
        config: the configuration.
        sizes: the sizes of its base model.
        machine: the machine to plan for.
        data_bytes: download of the data set; 0 for a local one, None if not known.
        adapter: parameters of the adapter to merge.
    """
    specs = config.quantize.variants
    variants = {spec.name: sizes.stored_bytes(spec, config.merges) for spec in specs}
    model = sizes.bf16_bytes if config.merges else sizes.file_bytes
    stages = []
    if isinstance(config, TrainingRun):
        stages.append(_train(config, sizes, machine, data_bytes or 0))
    if config.merges:
        stages.append(_merge(config, sizes, machine, variants, adapter))
    if isinstance(config, MeasuredRun):
        stages.append(_evaluate(config, sizes, machine, model))
    if config.quantize.targeted:
        stages.append(_allocate(config, sizes, model))
    if config.quantize.calibrated:
        stages.append(_calibrate(config, sizes, model))
    if config.quantize.distilled:
        stages.append(_distill(config, sizes, model))
    if specs and not _made_by_merge(config):
        stages.append(_quantize(config, sizes, variants, model))
    if isinstance(config, MeasuredRun):
        stages += (_measure_variant(config, sizes, machine, spec, variants[spec.name]) for spec in specs)
    if config.publish.repo:
        stages.append(_publish(config, sizes, variants, model, adapter))
    if stages:  # the first one downloads or unpacks the model
        stages[0] = _with_model(stages[0], config, sizes)
    return stages


def _made_by_merge(config: Config) -> bool:
    """Return True if the merge makes the variants in the same pass."""
    later = config.quantize.calibrated or config.quantize.targeted
    return config.merges and len(merge_bases(config)) == 1 and not later


def _with_model(stage: Stage, config: Config, sizes: Sizes) -> Stage:
    if sizes.kind == "package":
        base = {"unpacked base model": sizes.bf16_bytes + sizes.other_bytes}
        unpacking = {"libraries": memory.LIBRARIES["train"], "weights in float32": 6 * sizes.parameters}
        host = max(stage.host, unpacking, key=memory.total)
        return replace(stage, writes={**base, **stage.writes}, host=host)
    missing = sizes.fetched_bytes - sizes.here_bytes
    if config.model.low_disk:
        shards = {"two shards at a time": min(2 * sizes.shard_bytes, sizes.file_bytes)}
        return replace(stage, fetches=sizes.fetched_bytes, temporary={**stage.temporary, **shards})
    return replace(stage, fetches=stage.fetches + missing, caches=stage.caches + missing)


def _train(config: TrainingRun, sizes: Sizes, machine: Machine, data_bytes: int) -> Stage:
    trainings = [config.train]
    if config.train.preference:
        trainings.append(config.preference_run().train)
    needs = [training_memory.training(sizes, train, machine.has_gpu) for train in trainings]
    host, gpu = (max(need, key=memory.total) for need in zip(*needs, strict=True))
    trained = training_memory.trained_parameters(sizes, config.train)
    moments = 2 if machine.has_gpu and config.train.optimizer != "adamw" else 8
    return Stage(
        "train",
        fetches=data_bytes,
        caches=data_bytes,
        reads={"model": sizes.bf16_bytes},
        writes={
            "adapter" if config.train.adapts else "trained weights": 4 * trained * len(trainings),
            "checkpoints": config.train.keep_checkpoints * (4 + moments) * trained * len(trainings),
        },
        temporary={"checkpoint": (4 + moments) * trained},
        host=host,
        gpu=gpu,
        notes=(config.train.unused_remark,) if config.train.unused_remark else (),
    )


def _merge(config: Config, sizes: Sizes, machine: Machine, variants: Mapping[str, int], adapter: int) -> Stage:
    bases, along = merge_bases(config), len(variants) if _made_by_merge(config) else 0
    host, gpu = training_memory.merging(sizes, config, bases, along, machine.has_gpu)
    made = {"release": sizes.bf16_bytes + sizes.other_bytes}
    if adapter:
        made["adapter in the release"] = 4 * adapter
    if along:
        made |= {f"{name}, not measured yet": count for name, count in variants.items()}
    whole = 0 if config.has_adapter else 4 * sizes.parameters
    other = {"the other base's merge": sizes.bf16_bytes} if len(bases) > 1 else {}
    between = _before_k_quants(config, sizes) if along else {}
    notes = ("both bases are merged and compared; set merge.base to choose one",) if other else ()
    return Stage(
        "merge",
        reads={"model": sizes.bf16_bytes * len(bases) + whole},
        writes=made,
        temporary={**other, **between},
        host=host,
        gpu=gpu,
        notes=notes,
    )


def _evaluate(config: MeasuredRun, sizes: Sizes, machine: Machine, model: int) -> Stage:
    texts = 2 if config.data else 1
    states = {"reference for comparisons": 2 * sizes.hidden * config.evaluate.max_tokens * texts}
    reads = {"model": model, **({"base": sizes.bf16_bytes} if config.merges else {})}
    weights = max(model, 0 if sizes.kind == "package" else sizes.file_bytes)
    return replace(_measured(config, sizes, machine, "evaluate", weights), reads=reads, writes=states)


def _allocate(config: Config, sizes: Sizes, model: int) -> Stage:
    tables = sum(rows * width for rows, width in sizes.tables.values())
    states = compute_bytes_here() * memory.GRADIENT_TOKENS * sizes.hidden * sizes.layers
    aims = [spec.name for spec in config.quantize.variants if spec.target and spec.target.rise]
    again = f"{' and '.join(aims)} may be made and measured up to three times, and may get larger, to keep to its rise"
    return Stage(
        "allocate",
        reads={"model": model},
        temporary={"codes, one byte each": int(SCALES * sizes.linear_parameters) + tables, "activations": states},
        host=memory.allocating(sizes, config.quantize),
        notes=(again,) if aims else (),
    )


def _calibrate(config: Config, sizes: Sizes, model: int) -> Stage:
    codes = sum(sizes.linear_parameters for spec in memory.with_gram_matrices(config.quantize))
    border = compute_bytes_here() * config.quantize.calibration.tokens * sizes.hidden
    return Stage(
        "calibrate",
        reads={"model": model},
        writes={"codes, one byte each": int(SCALES * codes)},
        temporary={"activations between two blocks": border},
        host=memory.calibrating(sizes, config.quantize),
    )


def _distill(config: Config, sizes: Sizes, model: int) -> Stage:
    names = config.quantize.distilled
    states = compute_bytes_here() * config.quantize.distillation.tokens * sizes.hidden
    return Stage(
        "distill",
        reads={"model": model},
        writes={"codes, one byte each": int(SCALES * len(names) * sizes.linear_parameters)},
        temporary={"hidden states": states, "values of the best step": 16 * 2 * sizes.linear_parameters // 32},
        host=memory.distilling(sizes, config.quantize),
    )


def _quantize(config: Config, sizes: Sizes, variants: Mapping[str, int], model: int) -> Stage:
    return Stage(
        "quantize",
        reads={"model": model},
        writes={name: count + sizes.other_bytes for name, count in variants.items()},
        temporary=_before_k_quants(config, sizes),
        host=memory.quantizing(sizes, config.quantize.variants),
    )


def _before_k_quants(config: Config, sizes: Sizes) -> dict[str, int]:
    """Return the bytes of the unquantized GGUF files that llama.cpp makes K-quants from."""
    count = sum(1 for spec in config.quantize.variants if spec.quantizer)
    return {"the model as GGUF": count * sizes.bf16_bytes} if count else {}


def _measure_variant(config: MeasuredRun, sizes: Sizes, machine: Machine, spec: VariantSpec, stored: int) -> Stage:
    if spec.variant.engine == TRANSFORMERS:
        held = max(stored, sizes.bf16_bytes) if is_dequantized_to_run(spec, sizes.linear) else stored
        stage = _measured(config, sizes, machine, spec.name, held)
    elif is_installed("llama_cpp"):
        stage = Stage(spec.name, host=memory.in_llama_cpp(sizes, stored, config.evaluate.max_tokens))
    else:
        stage = _measured(config, sizes, machine, spec.name, sizes.bf16_bytes)
        slow = "llama.cpp is missing, so the dequantized weights are measured, without a speed"
        stage = replace(stage, notes=(*stage.notes, slow))
    return replace(stage, reads={"variant": stored})


def _measured(config: MeasuredRun, sizes: Sizes, machine: Machine, name: str, weights: int) -> Stage:
    """Return the stage that measures a model; `inference.offload` measures one that does not fit.

    If the configured GPU does not exist, all its memory is short.
    """
    tokens, device = config.evaluate.max_tokens, config.evaluate.device
    on_gpu = machine.has_gpu if device == "auto" else device == "cuda"
    free = machine.gpu_bytes or None if on_gpu else machine.host_bytes
    if free is not None and weights > WEIGHTS_SHARE * free:
        note = "does not fit, so its quality is measured from its files, slowly, layer by layer"
        slow = "which reads its model from the disk many times"
        return Stage(name, host=memory.offloaded(sizes, tokens), notes=(note,), untimed=slow)
    host, gpu = memory.measuring(sizes, weights, on_gpu, tokens)
    why = None if on_gpu == machine.has_gpu else "which runs on a device whose speed was not measured"
    return Stage(name, host=memory.probed(host, weights, on_gpu), gpu=gpu, untimed=why)


def _publish(config: Config, sizes: Sizes, variants: Mapping[str, int], model: int, adapter: int) -> Stage:
    sent = sum(variants.values()) + len(variants) * sizes.other_bytes + CARDS
    if config.merges:
        sent += model + 4 * adapter + sizes.other_bytes
    sent += sum(variants.get(name, 0) + sizes.other_bytes for name in config.publish.mirrors)
    return Stage("publish", uploads=sent, host={"libraries": 150 * memory.MB})


def disk_peaks(stages: Iterable[Stage]) -> Iterator[tuple[str, int]]:
    """Yield each stage's name and the largest size of the run's folder during the stage."""
    lying = 0
    for stage in stages:
        lying += sum(stage.writes.values())
        yield stage.name, lying + sum(stage.temporary.values())
