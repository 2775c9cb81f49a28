"""Formats of servers, which stock transformers opens with another package: planned, measured, told of and verified."""

from __future__ import annotations

import json

import pytest

from tests.extension.runs import quantizing
from tests.support.runs import Place

WAITING = ("gptq", "awq")  # for a package that the tests have not
RUNNING = ("w4a16", "w8a8", "fp8", "fp8-weight")  # with compressed-tensors


@pytest.fixture(scope="module", params=[*WAITING, *(pytest.param(name, marks=pytest.mark.slow) for name in RUNNING)])
def place(request, tmp_path_factory, tiny_model) -> Place:
    """A finished run that makes one variant. Its widths have the group size of 64 in common."""
    place = quantizing(
        tmp_path_factory.mktemp(request.param),
        tiny_model("llama", hidden_size=256, intermediate_size=320),
        request.param,
    )
    place.variant = request.param
    place.tunepress("run", "tiny.yaml")
    return place


def test_variant_is_planned_with_the_bytes_that_it_writes(place):
    plan = json.loads(place.tunepress("plan", "tiny.yaml", "--json").stdout)
    (stage,) = (stage for stage in plan["stages"] if stage["stage"] == "quantize")
    written = (place.release / place.variant / "model.safetensors").stat().st_size
    others = sum(path.stat().st_size for path in (place.release / place.variant).iterdir()) - written
    assert 0.98 * written < stage["writes"][place.variant] < 1.02 * written + others


def test_is_measured_although_the_stock_loader_lacks_its_package(place):
    found = place.results()[place.variant]
    assert found["loader"] == "pipeline.load" and found["speed"]["pipeline.load"]["runs"]
    if place.variant in WAITING:
        assert found["speed"]["stock"]["runs"] is False and "gptqmodel" in found["speed"]["stock"]["lacks"]
    else:
        assert found["speed"]["stock"]["runs"] and found["speed"]["pipeline.load"]["logits_off_stock"] < 0.03
    assert found["quality"]["general"]["kl"]["value"] > 0


def test_card_says_what_is_needed_and_how_the_format_stores(place):
    card = (place.release / place.variant / "README.md").read_text()
    package = "gptqmodel" if place.variant in WAITING else "compressed-tensors>=0.15"
    assert "vllm serve" in card and f"`{package}`" in card
    assert ("because it needs `gptqmodel`" in card) == (place.variant in WAITING)
    grouped = place.variant in (*WAITING, "w4a16")
    assert grouped == ("in groups of 64 (128 does not divide the width of every layer)" in card)
    assert ("a scale and zero point for each" in card) == (place.variant == "awq")


def test_release_verifies_and_says_which_snippets_wait_for_the_package(place):
    lines = place.tunepress("verify", str(place.release)).stdout.splitlines()
    waits = any("not run with stock libraries: needs gptqmodel" in line for line in lines)
    assert waits == (place.variant in WAITING)
    assert waits or any(line.split()[:2] == ["+", "snippets"] and "stock" in line for line in lines)
    assert [line for line in lines if line.lstrip().startswith("x")] == []
