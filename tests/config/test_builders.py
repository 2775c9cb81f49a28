"""Configurations made of command-line options: each option goes to the variants that accept it."""

from __future__ import annotations

import pytest

from pipeline.config.builders import calibration_settings, quantize_config, read_target
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    "variants, sizes",
    [
        ("both", {"int8": None, "int4": 128}),
        ("int8", {"int8": 128}),
        ("int4", {"int4": 128}),
        ("int4,q8_0,q4_k_m", {"int4": 128, "gguf-q8_0": 32, "gguf-q4_k_m": None}),
        ("int8,gguf-q4_0,gguf-f16", {"int8": 128, "gguf-q4_0": 32, "gguf-f16": None}),
    ],
)
def test_a_group_size_goes_to_variants_that_are_in_groups_anyway_if_there_are_any(variants, sizes):
    config = quantize_config("user/model", "out", [variants], group_size=128)
    assert {v.name: v.group_size for v in config.quantize.variants} == sizes
    with pytest.raises(ConfigError, match="int8 is asked for twice, .* Try: name it once"):
        quantize_config("user/model", "out", ["int8", "both"])


def test_group_size_is_applied_to_variants_that_accept_it():
    config = quantize_config("user/model", "out", ["int8,gguf-q4_0"], group_size=32)
    assert {v.name: v.group_size for v in config.quantize.variants} == {"int8": 32, "gguf-q4_0": 32}
    with pytest.raises(ConfigError, match="group_size 64: allowed are 32"):
        quantize_config("user/model", "out", ["gguf-q4_0"], group_size=64)


def test_rounding_is_applied_to_variants_that_accept_it():
    config = quantize_config("user/model", "out", ["int8,Q4_1,gguf-f16,q4_k_m,q6_k"], rounding="search")
    found = {v.name: v.rounding for v in config.quantize.variants}
    assert found == {"int8": "rtn", "gguf-q4_1": "search", "gguf-f16": None, "gguf-q4_k_m": None, "gguf-q6_k": "search"}
    with pytest.raises(ConfigError, match="--rounding hqq: none of gguf-q4_k_m takes it. Try: leave out --rounding"):
        quantize_config("user/model", "out", ["q4_k_m"], rounding="hqq")


def test_a_packing_goes_only_to_variants_that_can_be_stored_in_several():
    config = quantize_config("user/model", "out", ["both"], packing="tile_packed")
    assert [(v.name, v.packing) for v in config.quantize.variants] == [("int8", None), ("int4", "tile_packed")]
    with pytest.raises(ConfigError, match="--packing tile_packed: none of int8 takes it"):
        quantize_config("user/model", "out", ["int8"], packing="tile_packed")


def test_target_goes_to_variants_whose_layers_can_differ():
    target = read_target("bits=4.8")
    config = quantize_config("user/model", "out", ["both,q4_0"], target=target)
    assert {v.name: v.target and v.target.asked for v in config.quantize.variants} == {
        "int8": None,
        "int4": {"bits": 4.8},
        "gguf-q4_0": None,
    }
    with pytest.raises(ConfigError, match="bits=4.8: int8, gguf-q4_0 cannot have a target. Try: --variants int4"):
        quantize_config("user/model", "out", ["int8,q4_0"], target=target)
    with pytest.raises(ConfigError, match="int4 cannot have a target. Try: leave out --packing tile_packed"):
        quantize_config("user/model", "out", ["int4"], packing="tile_packed", target=target)


@pytest.mark.parametrize("text", ["rise", "rise=", "rise=-1", "rise=much", "size=3", "bits=4.8.1", "=3"])
def test_target_in_another_form_is_refused(text):
    with pytest.raises(ConfigError, match=f"--target {text}: not a target. Try: rise=0.03"):
        read_target(text)


def test_calibration_text_makes_calibrated_variants_by_default():
    assert calibration_settings(None, ()) == {}
    assert calibration_settings(None, ("a.txt",)) == {
        "quantize.quality": "calibrated",
        "quantize.calibration.source": ["a.txt"],
    }
    assert calibration_settings("distilled", ("a.txt",), 512)["quantize.quality"] == "distilled"
    assert calibration_settings("fast", ("a.txt",), targeted=True)["quantize.quality"] == "fast"
    with pytest.raises(ConfigError, match="a.txt: not used with --quality fast. Try: --quality calibrated"):
        calibration_settings("fast", ("a.txt",))


@pytest.mark.parametrize(("given", "meant"), [("seving", "serving"), ("W4A16g", "w4a16"), ("gguf-q4k", "gguf-q4_k")])
def test_name_that_is_nearly_one_is_answered_with_that(given, meant):
    with pytest.raises(ConfigError, match=f"{given}: allowed are .*everything; did you mean '{meant}'[?]$"):
        quantize_config("user/model", "out", [given])
