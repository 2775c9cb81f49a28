"""The results of a run: read and written without a change, and damage named in one line."""

from __future__ import annotations

import json
import math

import pytest

from pipeline.errors import HubError, WorkspaceError
from pipeline.evaluation.model_result import Estimate, ModelResult, Quality, Speed
from pipeline.evaluation.results import Results
from pipeline.system.files import write_json
from tests.support import sample

KINDS = ("results", "gguf_results", "gated_results", "adapter_results", "variants_results", "unmeasured_results")


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_written_as_they_were_read(tmp_path, kind):
    path, told = tmp_path / "results.json", getattr(sample, kind)()
    write_json(path, told)
    found = Results.read(path)
    write_json(tmp_path / "again.json", found.to_json())
    assert json.loads((tmp_path / "again.json").read_text()) == told


def test_results_keep_keys_of_other_versions_and_explicit_nulls():
    told = {"origin": {"source": "a/b", "revision": None}, "later": {"x": [1]}, "int8": {"later": 2, "ratio": None}}
    assert Results.model_validate(told).to_json() == told


def test_results_of_an_earlier_version_lack_figures_and_are_read():
    early = {"merged": {"size_bytes": 7, "quality": {"general": {"perplexity": {"value": 3.0, "stderr": 0.1}}}}}
    merged = Results.model_validate(early)["merged"]
    assert merged.on("general").perplexity == Estimate(3.0, 0.1) and merged.on("general").digest is None
    assert merged.on("held_out").perplexity is None and merged.machine is None and merged.fastest is None


def test_results_of_a_model_that_was_not_measured_are_empty():
    assert Results()["int8"] == ModelResult() and Results().models == {}


def test_results_of_a_release_have_its_variants_and_those_withheld_apart():
    found = Results.model_validate(sample.gguf_results())
    released = found.released(["int8"], withheld=["int4"])
    assert list(released.variants) == ["int8"] and list(released.withheld) == ["int4"]
    assert list(released.to_json())[-2:] == ["int8", "withheld"] and "gguf-q8_0" not in released.to_json()


def test_speed_of_a_model_is_that_of_the_first_loader_that_runs_it():
    stock, ours = Speed(runs=True, device="cpu"), Speed(runs=False)
    assert ModelResult(speed={"stock": stock, "pipeline.load": ours}).fastest is stock


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"int8": 7}, "variants.int8: Input should be"),
        ({"base": {"size_bytes": "7"}}, "base.size_bytes: Input should be a valid integer"),
        (
            {"base": {"quality": {"general": {"loss": {"value": True}}}}},
            "base.quality.general.loss.value: Input should",
        ),
        ({"base": {"speed": {"stock": {"runs": 1}}}}, "base.speed.stock.runs: Input should be a valid boolean"),
    ],
)
def test_damaged_results_are_named_by_key(tmp_path, told, says):
    write_json(tmp_path / "results.json", told)
    with pytest.raises(WorkspaceError, match=says):
        Results.read(tmp_path / "results.json")
    with pytest.raises(HubError, match=f"ada/tiny: its tunepress.json cannot be read .results.{says}"):
        Results.of_lineage({"results": told}, "ada/tiny")


def test_figure_without_an_error_is_null_in_a_file_and_nan_in_memory(tmp_path):
    quality = Quality(tokens=9, clusters=1, freedom=0.0, loss=Estimate(1.5, math.nan))
    write_json(tmp_path / "a.json", quality.to_json())
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["loss"] == {"value": 1.5, "stderr": None}
    back = Quality.model_validate(told)
    assert back.loss.value == 1.5 and math.isnan(back.loss.stderr) and back.to_json() == told
