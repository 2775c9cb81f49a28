"""A mixture of experts is planned, quantized, measured, told of in the card and verified."""

from __future__ import annotations

import json

import pytest

from tests.extension.runs import quantizing
from tests.support.runs import Place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model) -> Place:
    """A finished run that makes a variant of a mixture of experts."""
    place = quantizing(tmp_path_factory.mktemp("mixture"), tiny_model("qwen3_moe"), "int8")
    place.tunepress("run", "tiny.yaml")
    return place


def test_plan_knows_the_bytes_of_experts(place):
    plan = json.loads(place.tunepress("plan", "tiny.yaml", "--json").stdout)
    (stage,) = (stage for stage in plan["stages"] if stage["stage"] == "quantize")
    folder = place.release / "int8"
    written = (folder / "model.safetensors").stat().st_size
    assert 0.97 * written < stage["writes"]["int8"] < 1.02 * sum(path.stat().st_size for path in folder.iterdir())


def test_stock_transformers_runs_what_was_measured(place):
    found = place.results()["int8"]
    assert found["speed"]["stock"]["runs"] and found["speed"]["pipeline.load"]["runs"]
    assert found["weights"]["experts"] == 2 * 4 * 3
    assert found["quality"]["general"]["kl"]["value"] < 0.05


def test_card_tells_of_the_experts(place):
    card = (place.release / "int8" / "README.md").read_text()
    assert "experts as well, in stacks of which transformers computes one expert at a time" in card
    assert "experts in this format have no kernel there" in card


def test_release_verifies(place):
    lines = place.tunepress("verify", str(place.release)).stdout.splitlines()
    assert any(line.split()[:3] == ["+", "measured", "int8,"] for line in lines)
    assert not [line for line in lines if line.lstrip().startswith("x")]


def test_variants_that_do_not_hold_experts_are_refused_before_anything_is_read(place):
    (place.folder / "four.yaml").write_text((place.folder / "tiny.yaml").read_text().replace("int8", "int4"))
    said = place.tunepress("plan", "four.yaml", check=2).stderr
    assert "int4: stock transformers cannot run experts in 4 bits" in said and "Traceback" not in said
