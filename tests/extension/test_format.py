"""A format that one file adds is planned, written, measured, told of in the card, verified and loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.extension import signs_format
from tests.extension.runs import quantizing
from tests.support.runs import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model) -> Place:
    """A finished run that makes the variant of the format."""
    place = quantizing(tmp_path_factory.mktemp("format"), tiny_model("llama"), signs_format.NAME, signs_format)
    place.tunepress("run", "tiny.yaml")
    return place


def test_format_is_planned_with_the_bytes_that_it_writes(place):
    plan = json.loads(place.tunepress("plan", "tiny.yaml", "--json").stdout)
    written = (place.release / "signs" / "model.safetensors").stat().st_size
    (stage,) = (stage for stage in plan["stages"] if stage["stage"] == "quantize")
    others = sum(path.stat().st_size for path in (place.release / "signs").iterdir()) - written
    assert 0.98 * written < stage["writes"]["signs"] < 1.02 * written + others


def test_format_is_written_and_measured(place):
    from safetensors.torch import load_file

    weights = load_file(place.release / "signs" / "model.safetensors")
    row = weights["model.layers.0.self_attn.q_proj.weight"][0].float()
    assert row.abs().unique().numel() == 1 and row.unique().numel() == 2
    found = place.results()["signs"]
    assert found["loader"] == "pipeline.load" and found["speed"]["stock"]["runs"]
    assert found["quality"]["general"]["kl"]["value"] > 0


def test_card_says_how_the_format_stores_and_loads(place):
    card = (place.release / "signs" / "README.md").read_text()
    assert "linear layers are signs, one scale for each row" in card and 'subfolder="signs"' in card


def test_release_with_the_format_verifies(place):
    # The snippet that uses tunepress runs with the installed package alone, which has no such format.
    lines = place.tunepress("verify", str(place.release), check=None).stdout.splitlines()
    assert any(line.split()[:3] == ["+", "measured", "signs,"] for line in lines)
    assert [line for line in lines if line.lstrip().startswith("x") and "with tunepress" not in line] == []


def test_variant_of_the_format_loads(place):
    code = f"from pipeline import load; print(type(load({str(place.run_folder)!r}, variant='signs')[0]).__name__)"
    loaded = subprocess.run([sys.executable, "-c", code], env=place.env, capture_output=True, text=True)
    assert loaded.stdout.split()[-1:] == ["LlamaForCausalLM"], loaded.stderr


def test_help_names_the_variant_of_the_format(place):
    assert "signs" in place.tunepress("quantize", "--help").stdout


def test_format_is_unknown_without_its_registration(place):
    assert "allowed are" in Place(place.folder).tunepress("plan", "tiny.yaml", check=2).stderr
