"""The demo on its real model, with fewer steps: `./launch.sh --test -m slow`."""

from __future__ import annotations

import pytest

from tests.support.runs import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("demo"))
    place.output = place.tunepress(
        "run", "demo", "--set", "train.max_steps=30", "--set", "data.limit=1200", "--set", "evaluate.max_tokens=4096",
        "--set", "name=tiny",
    )  # fmt: skip
    return place


def test_fine_tuning_lowers_perplexity_on_held_out_text_by_more_than_the_errors(demo):
    base, merged = (demo.results()[m]["quality"]["held_out"]["perplexity"] for m in ("base", "merged"))
    assert merged["value"] + merged["stderr"] < base["value"] - base["stderr"]


def test_demo_int8_is_within_a_percent_and_int4_keeps_the_training(demo):
    results = demo.results()
    assert abs(results["int8"]["quality"]["held_out"]["rise"]["value"]) < 0.01
    base, merged, int4 = (results[m]["quality"]["held_out"]["loss"]["value"] for m in ("base", "merged", "int4"))
    assert int4 < (base + merged) / 2


def test_linear_weights_take_the_bytes_that_their_formats_promise(demo):
    results = demo.results()
    for variant, most in (("int8", 0.52), ("int4", 0.36)):
        weights = results[variant]["weights"]
        assert weights["weight_bytes"] <= most * weights["source_bytes"]


def test_the_demo_answers_in_the_style_of_its_data(demo):
    answers = {a["prompt"]: a["answer"] for a in demo.results()["merged"]["answers"]}
    assert all(answers.values())
    assert "Paris" in answers["What is the capital of France?"]
