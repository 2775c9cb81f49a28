"""Runs that start from an existing model or adapter: the same folders, cards and events."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.config.builders import quantize_config
from pipeline.errors import StageFailed
from pipeline.models.checkpoint import Checkpoint
from pipeline.workflow.run import run
from pipeline.workflow.stages.inputs import hashes_of
from pipeline.workflow.workspace import Workspace
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, Place
from tests.support.texts import general_text


@pytest.fixture(scope="module")
def quantized_only(tmp_path_factory, tiny_model):
    """`quantize MODEL --output out`, and then `publish out`: (place, what each printed)."""
    folder = tmp_path_factory.mktemp("midway")
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        place = Place(folder, hub)
        asked = ("quantize", str(tiny_model("llama")), "--output", "out", "--variants", "int4_weight_only")
        lenient = ("--set", "track.project=tests", "--set", "quantize.on_gate_failure=warn")
        made = place.tunepress(*asked, "--group-size", "32", *lenient)
        before = json.loads((folder / "out/.tunepress/results.json").read_text())
        published = place.tunepress("publish", "out", "--repo", "ada/small", "--json")
        yield place, made.stdout, before, json.loads(published.stdout)


def test_a_model_is_quantized_into_the_folder_that_was_named(quantized_only):
    place, printed, before, _ = quantized_only
    assert (place.folder / "out/int4/model.safetensors").is_file() and not (
        place.folder / "out/model.safetensors"
    ).exists()
    assert "nothing was measured" in printed and "size" in printed and "ppl" not in printed  # no empty columns
    assert set(before) == {"origin", "int4"}
    assert set(before["int4"]) == {"size_bytes", "ratio", "variant", "weights"}
    assert before["int4"]["variant"]["group_size"] == 32


def test_publishing_a_merged_model_measures_it_first(quantized_only):
    place, _, _, said = quantized_only
    results = json.loads((place.folder / "out/.tunepress/results.json").read_text())
    assert results["int4"]["quality"]["general"]["kl"]["value"] > 0 and "held_out" not in results["int4"]["quality"]
    card = place.hub.read("ada/small", "README.md").decode()
    assert "int4" in card and "Training" not in card
    files = set(place.hub.files("ada/small"))
    assert {"README.md", "tunepress.json", "int4/model.safetensors", "int4/README.md"} <= files
    assert "config.json" not in files and not any(".tunepress/" in name for name in files)
    records = [json.loads(line) for line in (place.folder / "out/.tunepress/events.jsonl").read_text().splitlines()]
    (compared,) = (record["models"] for record in records if "models" in record)
    assert [row["model"] for row in compared] == ["base", "int4"]
    names = [r["event"] for r in records if "event" in r]
    assert names[:2] == ["quantization_started", "quantization_completed"]
    assert {"evaluation_started", "evaluation_completed", "quantized_model_pushed", "model_card_pushed"} <= set(names)
    assert said["published"]["repo"] == "ada/small"
    assert sorted(names) == sorted(a["title"] for a in place.alerts())


@pytest.mark.slow
def test_relative_source_path_is_not_recorded(tmp_path, tiny_model):
    place = Place(tmp_path)
    shutil.copytree(tiny_model("llama"), tmp_path / "first")
    shutil.copytree(tiny_model("qwen3"), tmp_path / "second")
    (tmp_path / "general.txt").write_text(general_text())
    settings = (
        "--set",
        "quantize.on_gate_failure=warn",
        "--set",
        "evaluate.general=general.txt",
        "--set",
        "evaluate.max_tokens=512",
        "--set",
        "track.project=tests",
    )
    place.tunepress("quantize", "first", "--output", "out", "--variants", "int8", "--measure", *settings)
    results = json.loads((tmp_path / "out/.tunepress/results.json").read_text())
    assert (
        results["base"]["quality"]["general"]["perplexity"]["value"] > 1
        and "kl" in results["int8"]["quality"]["general"]
    )
    place.tunepress("quantize", "second", "--output", "out", "--variants", "int8", "--set", "track.project=tests")
    results = json.loads((tmp_path / "out/.tunepress/results.json").read_text())
    assert set(results) == {"origin", "int8"} and "quality" not in results["int8"]
    assert "first" not in (tmp_path / "out/README.md").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".tunepress", "README.md", "int8", "tunepress.json",
    ]  # fmt: skip


def test_an_adapter_from_elsewhere_is_merged_and_its_model_loads(copied, tmp_path):
    trained = copied.run_folder / "adapter"
    base = Workspace(copied.run_folder).read_ledger().base.folder
    place, run = Place(tmp_path), copied.results()["merge"]["base"]
    place.tunepress("merge", base, str(trained), "--output", "out", "--base", run, "--set", "track.project=tests")
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(copied.release)
    assert all(ours.read(name).equal(theirs.read(name)) for name in theirs)  # the very model that the run made
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


def test_clean_keeps_the_release_and_the_ledger_valid(copied):
    (copied.run_folder / "merged-nf4.partial").mkdir()
    before = copied.release.stat().st_mtime_ns
    said = json.loads(copied.tunepress("clean", "runs/tiny", "--json").stdout)
    assert said["freed_bytes"] > 0 and {"checkpoints", "merged-nf4.partial"} <= set(said["removed"])
    assert not (copied.run_folder / "checkpoints").exists() and copied.release.stat().st_mtime_ns == before
    again = copied.tunepress("run", "tiny.yaml").stdout
    assert again.count("done before") == 6 and "> " not in again
    assert copied.tunepress("clean", "runs/tiny").stdout == "nothing to remove\n"


def test_a_finished_run_needs_none_of_its_inputs_to_be_published(copied):
    """Not even the folder in which they had their names."""
    (copied.folder / "rows.jsonl").unlink(missing_ok=True)
    elsewhere = copied.folder / "elsewhere"
    elsewhere.mkdir()
    (copied.folder / "runs").rename(elsewhere / "runs")
    with LoopbackHub(elsewhere / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        Place(elsewhere, hub).tunepress("publish", "runs/tiny", "--repo", "ada/moved")
        assert {"model.safetensors", "int8/model.safetensors"} <= set(hub.files("ada/moved"))


@pytest.mark.slow
def test_user_files_and_text_survive_a_repeated_step(copied):
    """Only what the step made before, and weights that would be taken for its own, go."""
    (copied.release / "int8/notes.md").write_text("mine")
    (copied.release / "photo.old-2024").write_text("mine")
    (copied.release / "model-00001-of-00002.safetensors").write_bytes(b"of an older merge")
    card = copied.release / "int8/README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    (copied.release / "int8/config.json").unlink()
    copied.tunepress("quantize", "tiny.yaml")
    assert (copied.release / "int8/notes.md").read_text() == "mine" and "My own words." in card.read_text()
    (copied.release / "model.safetensors").unlink()
    copied.tunepress("merge", "tiny.yaml")
    copied.tunepress("clean", "runs/tiny")
    assert (copied.release / "photo.old-2024").exists() and (copied.release / "int8/notes.md").exists()
    assert [p.name for p in copied.release.glob("*.safetensors")] == ["model.safetensors"]


def test_hard_links_are_counted_as_two_files(tmp_path):
    """As in the Hub's cache, where equal files are links to one."""
    (tmp_path / "blob").write_text("terms")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("LICENSE", "LICENSE.txt"):
        (folder / name).symlink_to(tmp_path / "blob")
    workspace = Workspace(tmp_path / "run")
    workspace.folder.mkdir()
    hashes = hashes_of(workspace, str(folder))
    assert set(hashes) == {"LICENSE", "LICENSE.txt"} and len(set(hashes.values())) == 1
    shutil.rmtree(folder)
    assert hashes_of(workspace, str(folder)) == hashes


def test_no_card_is_written_if_no_variant_was_made(tiny_model, tmp_path):
    settings = ["quantize.variants=[{name: int8, keep: [down_proj]}]"]
    config = quantize_config(str(tiny_model("llama")), tmp_path / "out", ["int8"], settings=settings)
    with pytest.raises(StageFailed, match="did you mean"):
        run(config, output=tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
