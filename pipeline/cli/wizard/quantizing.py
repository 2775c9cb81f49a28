"""Questions about quantization: which variants, group size, GGUF, and what happens at a failed gate."""

from __future__ import annotations

from operator import attrgetter

from pipeline.cli.wizard.compatibility import check_quantizable, check_variants, holding_experts, suited
from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.model import recipe_tree
from pipeline.cli.wizard.presets import PROFILES
from pipeline.cli.wizard.prompts import Question, one_of, yes_or_no
from pipeline.config.builders import read_target
from pipeline.config.catalog import DEFAULT_VARIANTS, GGUF, GROUP_SIZES, TRANSFORMERS, VARIANTS
from pipeline.config.presets import PLACES, PRESETS, expand, variants_for
from pipeline.errors import ConfigError
from pipeline.evaluation.gates import limits
from pipeline.planning.engines import tell_misfits

AS_THE_RECIPE, NONE, TARGET = "recipe", "none", "target"
FORMER_TARGET = "escalate"  # the answer in earlier versions
GATES = {
    "withhold": "not published; the card says so",
    "warn": "published with a warning",
    TARGET: "int4 gets as many bits as it needs to pass, which takes a while; other variants are withheld. "
    "For another target of int4, answer rise=0.03, size_mb=500 or bits=4.8",
}
TYPES = {v.file_type.lower(): v.name for v in VARIANTS.values() if v.format == GGUF and v.file_type}


def _take_quantize(draft: Draft, answer: str) -> None:
    quantizes = yes_or_no(answer)
    if quantizes:
        check_quantizable(draft.model_sizes)
    draft.quantizes = quantizes
    if not draft.quantizes:
        draft.set({"quantize.variants": []})


def _take_place(draft: Draft, answer: str) -> None:
    draft.place = one_of(answer, tuple(PLACES))


def _about_quantization(draft: Draft) -> str:
    recipe = [f"{AS_THE_RECIPE}: the variants of the recipe {draft.recipe}"] if draft.recipe else []
    presets = [f"{name}: {about}" for name, (about, _) in PRESETS.items()]
    by_name = (
        f"Names separated by commas, or one of the presets below. For this: {', '.join(variants_for(draft.place))}."
    )
    return "\n  ".join([by_name, *presets, *recipe])


def _default_quantization(draft: Draft) -> str:
    if draft.place in PRESETS:
        return draft.place
    if draft.recipe and draft.profile == "standard":
        return AS_THE_RECIPE
    return PROFILES[draft.profile].quantization


def _take_quantization(draft: Draft, answer: str) -> None:
    word = answer.strip().lower().replace("-", "_")
    if word == AS_THE_RECIPE and draft.recipe:
        asked = recipe_tree(draft.recipe)["quantize"]["variants"]
        variants = [item if isinstance(item, dict) else {"name": item} for item in asked]
    else:
        variants = _named(answer)
    if word == AS_THE_RECIPE or word in PRESETS:  # nobody named these variants one by one
        variants = holding_experts(draft, variants)
    _set_variants(draft, suited(draft, variants))
    for line in tell_misfits(draft.config(), draft.model_sizes):
        draft.tell(line)


def _named(answer: str) -> list[dict]:
    try:
        variants = expand([answer])
    except KeyError as unknown:
        allowed = ", ".join([*PRESETS, *DEFAULT_VARIANTS, "both"])
        raise ConfigError(f"{unknown.args[0]!r}: neither a preset nor a variant. Try: {allowed}") from None
    if not variants:
        raise ConfigError(f"{answer!r}: no variant is named. Try: --no-quantize, to make none")
    return list({variant["name"]: variant for variant in variants}.values())


def _set_variants(draft: Draft, variants: list[dict]) -> None:
    settings = {"quantize.variants": variants}
    config = draft.config(settings)
    check_variants(config, draft.model_sizes)
    draft.check_fits(config)
    draft.set(settings)


def _variants(draft: Draft) -> list[dict]:
    return draft.tree["quantize"]["variants"]


def _in_groups(item: dict) -> bool:
    """Return True if the variant has groups of a size that can be chosen."""
    variant = VARIANTS[item["name"]]
    return variant.group_size is not None and len(variant.group_sizes) > 1


def _default_group_size(draft: Draft) -> str:
    item = next(filter(_in_groups, _variants(draft)))
    return str(item.get("group_size") or VARIANTS[item["name"]].group_size)


def _take_group_size(draft: Draft, answer: str) -> None:
    if not answer.isdecimal():
        raise ConfigError(f"group size {answer!r}: not supported. Try: {', '.join(map(str, GROUP_SIZES))}")
    variants = [{**v, "group_size": int(answer)} if _in_groups(v) else v for v in _variants(draft)]
    _set_variants(draft, variants)


def _take_gguf(draft: Draft, answer: str) -> None:
    if answer.lower() == NONE:
        return
    names = []
    for part in filter(None, (part.strip().lower().removeprefix(f"{GGUF}-") for part in answer.split(","))):
        if part not in TYPES:
            raise ConfigError(f"{part!r}: not a GGUF type. Try: {NONE}, {', '.join(TYPES)}")
        names.append(TYPES[part])
    if not names:
        raise ConfigError(f"{answer!r}: no GGUF type is named. Try: {NONE}, {', '.join(TYPES)}")
    present = [variant["name"] for variant in _variants(draft)]
    _set_variants(draft, _variants(draft) + [{"name": n} for n in dict.fromkeys(names) if n not in present])


def _about_gate(draft: Draft) -> str:
    quantize = draft.config().quantize
    allowed = ", ".join(f"{spec.name} {100 * limits(quantize, spec.name)['rise']:g} %" for spec in quantize.variants)
    return f"If perplexity rises by more than {allowed}: {'; '.join(map(': '.join, GATES.items()))}."


def _take_gate(draft: Draft, answer: str) -> None:
    own = read_target(answer.strip(), "gate") if "=" in answer else None
    choice = TARGET if own or answer.strip().lower() == FORMER_TARGET else one_of(answer, tuple(GATES))
    if choice != TARGET:
        draft.set({"quantize.on_gate_failure": choice})
        return
    quantize = draft.config().quantize
    aims = {v.name: own or {"rise": limits(quantize, v.name)["rise"]} for v in quantize.variants if v.mixes}
    if not aims:
        raise ConfigError(f"{TARGET}: no variant here can have different bits by layer. Try: withhold, warn")
    variants = [v | ({TARGET: aims[v["name"]]} if v["name"] in aims else {}) for v in _variants(draft)]
    draft.set({"quantize.variants": variants, "quantize.on_gate_failure": "withhold"})


QUESTIONS = (
    Question(
        "quantize",
        "Make quantized models",
        lambda draft: "Smaller copies of the model, in folders beside it. Each is measured before it is published.",
        lambda draft: "yes",
        _take_quantize,
        denies="no-quantize",
    ),
    Question(
        "where",
        "Where the quantized models will run",
        lambda draft: "; ".join(f"{name}: {about}" for name, (about, _) in PLACES.items()),
        lambda draft: TRANSFORMERS,
        _take_place,
        attrgetter("quantizes"),
    ),
    Question(
        "quantization",
        "Quantized models",
        _about_quantization,
        _default_quantization,
        _take_quantization,
        attrgetter("quantizes"),
    ),
    Question(
        "group-size",
        "Group size of int4",
        lambda draft: "Number of weights that share a scale: 32 is most accurate, 256 is smallest.",
        _default_group_size,
        _take_group_size,
        lambda draft: draft.quantizes and any(map(_in_groups, _variants(draft))),
    ),
    Question(
        GGUF,
        "GGUF",
        lambda draft: f"Files for llama.cpp and Ollama, separated by commas: {', '.join(TYPES)}; or {NONE}.",
        lambda draft: NONE,
        _take_gguf,
        attrgetter("quantizes"),
    ),
    Question(
        "gate",
        "Failed quality gate",
        _about_gate,
        lambda draft: draft.config().quantize.on_gate_failure,
        _take_gate,
        attrgetter("quantizes"),
    ),
)
