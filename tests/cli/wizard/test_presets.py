"""Presets of the wizard: valid configurations with the stated values."""

from __future__ import annotations

import pytest

from pipeline.cli.wizard.presets import PROFILES
from pipeline.config.catalog import DEFAULT_VARIANTS
from pipeline.config.loader import parse_config
from pipeline.config.presets import PRESETS
from pipeline.config.schema import Quantize

TREE = {"name": "x", "model": {"source": "ada/base"}, "data": {"source": "ada/rows"}}


@pytest.mark.parametrize("name", PRESETS)
def test_every_quantization_is_a_valid_one(name):
    asked = PRESETS[name][1]
    assert [spec.name for spec in Quantize(variants=list(asked)).variants] == [variant["name"] for variant in asked]


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
