"""Fallbacks of a variant: which there are, in which order, and which layers get eight bits."""

import math

import pytest

from pipeline.config.schema import VariantSpec
from pipeline.evaluation.escalation import Fallback, best, distance, fallbacks, with_layers
from pipeline.evaluation.model_result import Check, Estimate, LayerLoss, ModelResult, Verdict
from pipeline.models.matrices import linear_weights, table_weights


def found_for(folder, name: str, **options) -> list[Fallback]:
    asked = VariantSpec(name=name, **options).resolved()
    return fallbacks(asked, linear_weights(folder), table_weights(folder), folder)


def ways(found: list[Fallback]) -> list[tuple]:
    return [(r.spec.rounding, r.spec.group_size, r.spec.embeddings, r.share) for r in found]


def test_int4_fallbacks_cover_roundings_groups_embeddings_and_mixed_layers(tiny_model):
    found = ways(found_for(tiny_model("llama"), "int4", group_size=64))
    assert set(found) == {
        ("search", 64, "keep", 0), ("hqq", 64, "keep", 0), ("search", 32, "keep", 0), ("hqq", 32, "keep", 0),
        *(("search", 32, "int8", share) for share in (0, 0.05, 0.1, 0.2, 0.4, 0.6)),
    }  # fmt: skip


@pytest.mark.parametrize("rounding, best", [("search", "search"), ("hqq", "hqq"), ("rtn", "search")])
@pytest.mark.parametrize("size", [64, 32])
def test_layers_get_eight_bits_in_the_smallest_groups_with_the_best_rounding(tiny_model, size, rounding, best):
    found = found_for(tiny_model("llama"), "int4", group_size=size, rounding=rounding, embeddings="int8")
    assert {way[:3] for way in ways(found) if way[3]} == {(best, 32, "int8")}


@pytest.mark.parametrize("asked", [("int4", {}), ("int8", {}), ("int8-dynamic", {})])
def test_fallbacks_are_sorted_by_size_and_include_the_request(tiny_model, asked):
    name, options = asked
    found = found_for(tiny_model("llama"), name, **options)
    assert [r.bytes for r in found] == sorted(r.bytes for r in found) and len(found) > 1
    assert VariantSpec(name=name, **options).resolved() in [r.spec for r in found]


def test_bytes_are_those_of_the_files_but_for_what_all_variants_have(tiny_model, quantized):
    from pipeline.models.checkpoint import Checkpoint

    source = tiny_model("llama")
    found = [r for r in found_for(source, "int4", group_size=64) if not r.share]
    options = [fallback.spec.model_dump(include={"rounding", "group_size", "embeddings"}) for fallback in found]
    made = [Checkpoint(quantized(source, "int4", **given) / "int4") for given in options]
    assert len({checkpoint.nbytes - fallback.bytes for checkpoint, fallback in zip(made, found, strict=True)}) == 1


def test_embeddings_stay_if_transformers_could_not_load_them(tiny_model):
    found = found_for(tiny_model("gemma3_text"), "int4")
    assert {r.spec.embeddings for r in found} == {"keep"} and max(r.share for r in found) == 0.6


@pytest.mark.parametrize("name", ["gguf-q4_k_m", "gguf-bf16"])
def test_variant_without_options_has_no_fallback(tiny_model, name):
    if name == "gguf-q4_k_m":
        pytest.importorskip("llama_cpp")
    assert len(found_for(tiny_model("llama"), name)) == 1


def test_layers_that_cost_most_for_their_size_get_eight_bits_until_the_share_is_full():
    kl = {"a": (100, 0.1), "b": (100, 0.4), "c": (800, 0.8), "d": (1000, 0.1)}
    layers = [LayerLoss(name=n, weights=w, kl=Estimate(v, 0.0)) for n, (w, v) in kl.items()]
    spec = VariantSpec(name="int4").resolved()
    chosen = [with_layers(Fallback(spec, share, 0), layers).int8 for share in (0.05, 0.1, 0.4, 0.5)]
    assert chosen == [["b"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]


def test_the_nearest_is_the_one_whose_worst_figure_is_least_above_its_limit():
    def verdict(*figures):
        checks = (Check(value=v, stderr=0.01, quantile=2.0, limit=limit) for v, limit in figures)
        return Verdict(checks=tuple(checks))

    assert distance(verdict((0.08, 0.05), (0.01, 0.3))) == pytest.approx(2.0)
    assert distance(verdict()) == math.inf
    ways = [ModelResult(gate=verdict(*figures)) for figures in (((0.08, 0.05), (0.0, 1)), ((0.04, 0.05), (0.5, 0.4)))]
    assert best(ways) is ways[1]
