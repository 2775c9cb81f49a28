"""A run on one machine: its results, a second run, and what a changed setting repeats."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from pipeline.evaluation.cluster_errors import quantile
from tests.support import REPOSITORY
from tests.support.runs import write_place


def test_every_model_is_measured_on_both_texts_with_errors(each_run):
    results = each_run.results()
    for name in ("base", "merged", "int8", "int4"):
        for text in ("held_out", "general"):
            figures = results[name]["quality"][text]
            assert figures["perplexity"]["value"] > 1 and figures["perplexity"]["stderr"] > 0
            assert figures["tokens"] > 50
            assert ("kl" in figures) == (name != "merged")
        assert results[name]["size_bytes"] > 0 and results[name]["answers"]
        speeds = results[name]["speed"]
        assert all(s["load_seconds"] > 0 and s["peak_memory_bytes"] > 1e6 for s in speeds.values())
    assert results["int8"]["speed"]["stock"]["runs"] and results["int8"]["speed"]["pipeline.load"]["runs"]
    assert results["int4"]["speed"]["pipeline.load"]["runs"]
    assert results["int8"]["quality"]["held_out"]["kl"]["value"] < results["int4"]["quality"]["held_out"]["kl"]["value"]


def test_fine_tuning_lowers_held_out_perplexity(each_run):
    results = each_run.results()
    base, merged = (results[m]["quality"]["held_out"]["perplexity"] for m in ("base", "merged"))
    assert merged["value"] + 2 * merged["stderr"] < base["value"] - 2 * base["stderr"]


def test_better_of_both_merges_is_kept(each_run):
    merge = each_run.results()["merge"]
    compared = merge["compared"]
    assert {"live", "nf4", "bf16"} <= set(compared)
    assert all(compared[k]["kl"]["value"] >= 0 for k in ("nf4", "bf16"))
    # Merging into what training saw reproduces what was trained, up to rounding.
    assert compared["nf4"]["kl"]["value"] < compared["bf16"]["kl"]["value"]
    gap = compared["nf4_minus_bf16"]
    clear = abs(gap["value"]) > quantile(2, compared["freedom"]) * gap["stderr"]
    assert merge["base"] == (("nf4" if gap["value"] < 0 else "bf16") if clear else "nf4")


def test_group_size_falls_back_so_that_every_layer_is_quantized(unpublished):
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.matrices import linear_weights

    linear = linear_weights(unpublished.release)
    for variant in ("int8", "int4"):
        stored = Checkpoint(unpublished.release / variant)
        for name in linear:
            assert name not in stored
            assert f"{name.removesuffix('weight')}_weight_qdata" in stored
    chosen = unpublished.results()["int4"]["weights"]["group_sizes"]
    asked = unpublished.results()["int4"]["variant"]["group_size"]
    narrow = {name for name, (_, width) in linear.items() if width % asked}
    assert narrow and set(chosen) == narrow and set(chosen.values()) == {32}


def test_release_contains_no_path_of_this_machine(each_run):
    for path in each_run.release.rglob("*"):
        if path.is_file():
            assert str(each_run.folder).encode() not in path.read_bytes(), path


def test_a_second_run_does_nothing_and_is_quick(unpublished):
    before = unpublished.ledger()
    start = time.monotonic()
    done = unpublished.tunepress("run", "tiny.yaml")
    assert time.monotonic() - start < 20
    assert unpublished.ledger() == before
    assert "done before" in done.stdout and "\n> " not in done.stdout


@pytest.mark.slow
def test_a_removed_variant_is_made_again_and_nothing_else(copied):
    before, files = copied.ledger(), len(copied.events())
    digest = before["quantize/int4"]["outputs"]["release/int4/model.safetensors"]["sha256"]
    shutil.rmtree(copied.release / "int4")
    copied.tunepress("run", "tiny.yaml")
    after = copied.ledger()
    assert {k for k in after if after[k] != before[k]} == {"quantize/int4", "render"}
    assert {e.get("variant") for e in copied.events()[files:]} == {"int4"}
    assert after["quantize/int4"]["outputs"]["release/int4/model.safetensors"]["sha256"] == digest
    assert (copied.release / "int4" / "README.md").is_file()


@pytest.mark.slow
def test_a_changed_setting_redoes_its_stage_and_what_follows(copied):
    before = copied.ledger()
    copied.tunepress("run", "tiny.yaml", "--set", "quantize.variants=[int8, {name: int4, rounding: rtn}]")
    after = copied.ledger()
    assert {k for k in after if after[k] != before[k]} == {"quantize/int4", "render"}
    assert copied.results()["int4"]["variant"]["rounding"] == "rtn"


@pytest.mark.slow
def test_a_damaged_output_is_noticed(copied):
    weights = copied.release / "int8" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    copied.tunepress("run", "tiny.yaml")
    assert "quantization_completed int8" in copied.names()[-3:]


@pytest.mark.slow
def test_a_variant_that_cannot_be_made_is_refused_by_name_and_keeps_nothing_else_back(tiny_model, tmp_path):
    model = tiny_model("llama", intermediate_size=200)  # 200 columns: no group size divides them
    place = write_place(tmp_path, model)
    done = place.tunepress("run", "tiny.yaml", check=2)
    assert "mlp.down_proj" in done.stderr and "200" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "quantization_failed int4" in place.names() and "quantization_completed int8" in place.names()
    assert (place.release / "int8").is_dir() and not (place.release / "int4").exists()
    assert "int4/" not in (place.release / "README.md").read_text()


def test_lora_merges_into_its_own_base(tiny_model, tmp_path):
    place = write_place(tmp_path, tiny_model("qwen3"), train={"method": "lora"}, quantize={"variants": []})
    place.tunepress("train", "tiny.yaml")
    place.tunepress("merge", "tiny.yaml")
    assert place.results()["merge"]["base"] == "bf16"


def test_single_stage_names_the_missing_earlier_stage(tiny_model, tmp_path):
    place = write_place(tmp_path, tiny_model("llama"))
    done = place.tunepress("merge", "tiny.yaml", check=2)
    assert "train" in done.stderr


def test_json_output_is_one_object_for_machines(unpublished):
    done = unpublished.tunepress("run", "tiny.yaml", "--json")
    assert json.loads(done.stdout)["results"]["merged"]
    status = json.loads(unpublished.tunepress("status", "runs/tiny", "--json").stdout)
    assert "train" in status["ledger"] and status["events"]


def test_chat_answers_and_ends_with_the_input(unpublished):
    import subprocess

    done = subprocess.run(
        unpublished.command("chat", "runs/tiny/release", "--variant", "int4", "--new-tokens", "5"),
        cwd=unpublished.folder, env=unpublished.env, input="What is 2 plus 2?\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(">", 1)[1].strip()) > 0


@pytest.mark.usefixtures("cold")
def test_help_and_schema_answer_without_the_heavy_libraries(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, runpy; sys.argv = ['tunepress', '--help']\n"
        "try: runpy.run_module('pipeline', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = 'torch transformers datasets trl peft torchao huggingface_hub trackio matplotlib'.split()\n"
        "print('loaded:', [name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "Usage" in out and out.endswith("loaded: []\n")


def test_variant_measured_again_has_the_recorded_figures(unpublished, monkeypatch, tmp_path):
    from pipeline.verification.lineage_claims import read_claims
    from pipeline.verification.location import open_place
    from pipeline.verification.measure_again import Cuts, find_texts, judged, request_for
    from pipeline.verification.measure_process import look

    monkeypatch.chdir(unpublished.folder)  # where its configuration has its files
    place = open_place("runs/tiny", None, lambda done, total, what: None)
    claims = read_claims(place.lineage())
    texts = find_texts(claims, place, tmp_path / "texts")
    assert texts.names == ("held_out", "general") and texts.problems == {}
    findings = judged(claims, place, "int4", look(request_for(claims, place, "int4", texts)), Cuts())
    assert [(f.verdict.value, f.subject) for f in findings] == [
        ("ok", "int4, held-out text"),
        ("ok", "int4, general text"),
    ]
