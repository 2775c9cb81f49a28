"""Whoever has a model, or an adapter, enters midway, and gets the same folders, cards and events."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint import Checkpoint
from pipeline.cli import main
from pipeline.errors import ConfigError
from pipeline.midway import quantize_config
from tests.hub import LoopbackHub
from tests.run.conftest import TOKEN, Place


@pytest.fixture(scope="module")
def quantized_only(tmp_path_factory, tiny_model):
    """`quantize MODEL --output out`, and then `publish out`: (place, what each printed)."""
    folder = tmp_path_factory.mktemp("midway")
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        place = Place(folder, hub)
        asked = ("quantize", str(tiny_model("llama")), "--output", "out", "--variants", "int4_weight_only")
        made = place.tunepress(*asked, "--group-size", "32", "--set", "track.project=tests")
        before = json.loads((folder / "out/.tunepress/results.json").read_text())
        published = place.tunepress("publish", "out", "--repo", "ada/small", "--json")
        yield place, made.stdout, before, json.loads(published.stdout)


def test_a_model_is_quantized_into_the_folder_that_was_named(quantized_only):
    place, printed, before, _ = quantized_only
    assert (place.folder / "out/int4/model.safetensors").is_file() and not (
        place.folder / "out/model.safetensors"
    ).exists()
    assert "nothing was measured" in printed
    assert set(before) == {"origin", "int4"}
    assert set(before["int4"]) == {"size_bytes", "ratio", "variant", "weights"}
    assert before["int4"]["variant"]["group_size"] == 32


def test_publishing_it_measures_it_first_and_says_so_in_card_and_events(quantized_only):
    place, _, _, said = quantized_only
    results = json.loads((place.folder / "out/.tunepress/results.json").read_text())
    assert results["int4"]["quality"]["general"]["kl"]["value"] > 0 and "held_out" not in results["int4"]["quality"]
    card = place.hub.read("ada/small", "README.md").decode()
    assert "int4" in card and "Training" not in card
    files = set(place.hub.files("ada/small"))
    assert {"README.md", "tunepress.json", "int4/model.safetensors", "int4/README.md"} <= files
    assert "config.json" not in files and not any(".tunepress/" in name for name in files)
    records = [json.loads(line) for line in (place.folder / "out/.tunepress/events.jsonl").read_text().splitlines()]
    names = [r["event"] for r in records]
    assert names[:2] == ["quantization_started", "quantization_completed"]
    assert {"evaluation_started", "evaluation_completed", "quantized_model_pushed", "model_card_pushed"} <= set(names)
    assert said["published"]["repo"] == "ada/small"
    assert sorted(names) == sorted(a["title"] for a in place.alerts())


def test_publishing_it_again_sends_nothing(quantized_only):
    place, *_ = quantized_only
    commits = place.hub.commits("ada/small")
    assert "nothing to send" in place.tunepress("publish", "out", "--repo", "ada/small").stdout
    assert place.hub.commits("ada/small") == commits


def test_an_adapter_from_elsewhere_is_merged_and_its_model_loads(copied, tmp_path):
    trained = copied.run_folder / "adapter"
    base = json.loads((copied.run_folder / "base.json").read_text())["folder"]
    place = Place(tmp_path)
    place.tunepress("merge", base, str(trained), "--output", "out", "--base", "nf4", "--set", "track.project=tests")
    run = copied.results()["merge"]["base"]
    if run == "nf4":  # then it is the very model that the run made
        ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(copied.release)
        assert all(ours.read(name).equal(theirs.read(name)) for name in theirs)
    answer = place.python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('out', dtype='auto')\n"
        "tokenizer = AutoTokenizer.from_pretrained('out')\n"
        "print(model.generate(**tokenizer('Hello', return_tensors='pt'), max_new_tokens=3).shape)"
    )
    assert answer.strip() == "torch.Size([1, 8])"
    lineage = json.loads((tmp_path / "out/tunepress.json").read_text())
    assert {"adapter/adapter_model.safetensors", "model.safetensors"} <= set(lineage["files"])
    assert str(tmp_path) not in json.dumps(lineage) and str(copied.folder) not in json.dumps(lineage)


def test_cleaning_frees_what_the_release_does_not_need_and_the_run_still_holds(copied):
    (copied.run_folder / "merged-nf4.partial").mkdir()
    before = copied.release.stat().st_mtime_ns
    said = json.loads(copied.tunepress("clean", "runs/tiny", "--json").stdout)
    assert said["freed_bytes"] > 0 and {"checkpoints", "merged-nf4.partial"} <= set(said["removed"])
    assert not (copied.run_folder / "checkpoints").exists() and copied.release.stat().st_mtime_ns == before
    again = copied.tunepress("run", "tiny.yaml").stdout
    assert again.count("done before") == 6 and "> " not in again
    assert copied.tunepress("clean", "runs/tiny").stdout == "nothing to remove\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("quantize", "MODEL"), "--output DIR"),
        (("quantize", "MODEL", "--output", "full"), "full: has other things in it; choose a new folder"),
        (("quantize", "MODEL", "--output", "out", "--variants", "int5"), "--variants int5: allowed are int8, int4"),
        (("quantize", "MODEL", "--output", "out", "--group-size", "48"), "group_size 48: allowed are 32, 64, 128, 256"),
        (("quantize", "MODEL", "--output", "out", "--variants", "int8", "--group-size", "64"), "none of int8 takes it"),
        (("quantize", "MODEL", "--output", "out", "--rounding", "awq"), "--rounding awq: none of"),
        (("quantize", "./nowhere", "--output", "out"), "no such folder"),
        (("quantize", "demo", "--output", "out"), "is a configuration"),
        (("merge", "MODEL", "--output", "out"), "merge BASE ADAPTER --output DIR"),
        (("merge", "MODEL", "./nowhere", "--output", "out"), "merge.adapter './nowhere': has no adapter_config.json"),
        (("merge", "MODEL", "MODEL", "--output", "out", "--base", "fp8"), "merge.base"),
        (("publish", "full", "--repo", "ada/x"), "not a run's folder"),
        (("clean", "full"), "not a run's folder"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_anything_is_written(
    arguments, said, tmp_path, monkeypatch, capfd, tiny_model
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(
        sys, "argv", ["tunepress", *(str(tiny_model("llama")) if a == "MODEL" else a for a in arguments)]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and said in line
    assert not Path("out").exists() and [p.name for p in Path("full").iterdir()] == ["thesis.txt"]


def test_a_group_size_goes_only_to_variants_that_have_groups():
    config = quantize_config("user/model", "out", ["both"], group_size=128)
    assert [(v.name, v.group_size) for v in config.quantize.variants] == [("int8", None), ("int4", 128)]
    with pytest.raises(ConfigError, match="each variant can be asked for once"):
        quantize_config("user/model", "out", ["int8", "both"])
