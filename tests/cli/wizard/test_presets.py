"""Presets of the wizard: valid configurations with the stated values."""

from __future__ import annotations

import pytest

from pipeline.cli.wizard.presets import PROFILES
from pipeline.config.builders import variant_specs
from pipeline.config.catalog import DEFAULT_VARIANTS, VARIANTS
from pipeline.config.loader import parse_config
from pipeline.config.presets import PLACES, PRESETS, variants_for
from pipeline.config.schema import Quantize

TREE = {"name": "x", "model": {"source": "ada/base"}, "data": {"source": "ada/rows"}}


@pytest.mark.parametrize("name", PRESETS)
def test_every_quantization_is_a_valid_one(name):
    asked = PRESETS[name][1]
    assert [spec.name for spec in Quantize(variants=list(asked)).variants] == [variant["name"] for variant in asked]


@pytest.mark.parametrize("place", [name for name in PLACES if name in PRESETS])
def test_preset_of_a_place_runs_there(place):
    assert {variant["name"] for variant in PRESETS[place][1]} <= set(variants_for(place))


def test_places_offer_only_what_their_engines_run():
    assert "int8" not in variants_for("serving") and "w4a16" in variants_for("serving")
    assert all(name.startswith("gguf-") for name in variants_for("local"))
    assert set(variants_for("everything")) == set(VARIANTS)


@pytest.mark.parametrize("given", ["serving", ["Serving"], [{"name": "serving"}]])
def test_preset_is_a_name_of_variants(given):
    assert [spec.name for spec in Quantize(variants=given).variants] == ["w4a16", "w8a8", "fp8"]
    assert [item["name"] for item in variant_specs(["serving,int8"])] == ["w4a16", "w8a8", "fp8", "int8"]


def test_options_override_those_of_a_preset():
    (spec,) = Quantize(variants=[{"name": "edge", "embeddings": "keep"}]).variants
    assert (spec.name, spec.group_size, spec.embeddings) == ("int4", 128, "keep")
    assert variant_specs(["edge"], group_size=32) == [{"name": "int4", "group_size": 32, "embeddings": "int8"}]


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_a_valid_configuration_with_sixteen_sequences_a_step(name):
    settings = [f"{key}={value}" for key, value in PROFILES[name].settings.items()]
    train = parse_config(dict(TREE), name, settings).train
    assert train.batch_size * train.accumulate == 16
    assert PROFILES[name].quantization in (*PRESETS, *DEFAULT_VARIANTS)


def test_standard_is_what_a_configuration_has_by_default_with_smaller_embeddings():
    assert PROFILES["standard"].settings == {}
    plain = [{key: value for key, value in v.items() if key != "embeddings"} for v in PRESETS["balanced"][1]]
    assert Quantize(variants=plain) == Quantize()
