"""The accuracy benchmark: its options, its tables and picture, and a reordered model with the same logits."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.quantize import Quantize
from pipeline.config.schema import VariantSpec
from pipeline.errors import ConfigError, ModelError, StageFailed, UserError
from pipeline.evaluation.model_result import Estimate, ModelResult, Quality
from pipeline.models.channel_shuffle import reorder_channels
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.writer import quantize_checkpoint
from pipeline.system.libraries import is_installed
from pipeline.tracking.events import Events
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.workspace import Workspace
from tests.support import REPOSITORY
from tests.support.texts import general_text

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def script(monkeypatch):
    """`script(name)`: a module of `scripts/`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def benchmark(script):
    return script("benchmark_accuracy")


def test_variant_option_gives_specs_with_quality_and_other_keys(script):
    found = script("accuracy_ways").ways("int8, int4:32:hqq,int4:32,int4:32,both,int4:::calibrated:target.size_mb=105")
    int4 = {"name": "int4", "group_size": 32}
    expected = [{"name": "int8"}, {**int4, "rounding": "hqq"}, int4, {"name": "int4"}]
    assert [way.spec for way in found] == [*expected, {"name": "int4", "target": {"size_mb": 105}}]
    assert [way.quality for way in found] == [None] * 4 + ["calibrated"]
    assert found[-1].asked == "target size_mb=105"
    assert len({way.slug for way in found}) == len(found)


def test_ladder_has_every_quality_and_the_statistics_of_the_importance_matrix(script):
    ways = script("accuracy_ways")
    found = ways.ways(ways.ladder())
    assert {way.quality for way in found if way.spec["name"] == "int4"} == set(
        get_args(Quantize.model_fields["quality"].annotation)
    )
    assert ways.ways(ways.MOMENTS)[0] in found
    for way in found:
        assert Quantize(variants=[way.spec], quality=way.quality or "fast").variants[0].quantizes_embeddings


def test_interrupted_making_is_marked(script, benchmark, tmp_path):
    making, workspace = script("accuracy_making"), Workspace(tmp_path / "run")
    workspace.folder.mkdir()
    notes = tmp_path / "making.json"
    with pytest.raises(StageFailed):  # there is no configuration
        making.Costs(notes)("calibrate", ("int4",), workspace, Events(workspace.events_path, "x"), Reporter(), int)
    assert json.loads(notes.read_text()) == {"calibrate": {"resumed": True}}
    result = ModelResult(size_bytes=1, quality={"general": Quality(perplexity=Estimate(12, 1))})
    row = making.Row("x", "calibrated", result, making=json.loads(notes.read_text()))
    assert benchmark.figures(row)["making"]["resumed"]


def test_peers_are_named_with_and_without_importance_matrix(script):
    ways = script("accuracy_ways")
    assert [peer.label for peer in ways.peers("q4_0, Q4_0,Q4_K_M:imatrix")] == [
        "llama.cpp Q4_0",
        "llama.cpp Q4_K_M imatrix",
    ]
    with pytest.raises(ConfigError, match="--peers Q4_0:more"):
        ways.peers("Q4_0:more")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("int4:x", "int4:x"), ("int4:32:hqq:fast:more", "int4:32:hqq:fast:more"), ("int4:-32", "int4:-32"),
        (",", "names none"), ("int9", "int9"), ("int8,int4:33", "33"), ("int8,int4:32,int4:32:awq", "awq"),
        ("int4:32:hqq:best", "quality"), ("int4:embeddings=int8:32", "32 comes after"), ("int4:size=3", "size"),
    ],
)  # fmt: skip
def test_invalid_variant_is_refused_before_any_work(benchmark, monkeypatch, tmp_path, tiny_model, given, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", str(tiny_model("llama")), "--variants", given])
    with pytest.raises(UserError, match=told):
        benchmark.benchmark(benchmark._arguments())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--grid", "on"], ["--seed", "1"]])
def test_grid_and_seed_are_for_embedded_models(benchmark, monkeypatch, tmp_path, tiny_model, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", str(tiny_model("llama")), *option])
    with pytest.raises(ConfigError, match=f"{' '.join(option)}: .* is not embedded in a package"):
        benchmark.benchmark(benchmark._arguments())
    assert not list(tmp_path.iterdir())


def test_invalid_option_ends_with_one_line(tmp_path, tiny_model):
    command = [sys.executable, SCRIPTS / "benchmark_accuracy.py", tiny_model("llama"), "--variants", "int9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "int9" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_unknown_type_of_a_peer_is_refused(script):
    peers, ways = script("accuracy_peers"), script("accuracy_ways")
    if is_installed("llama_cpp"):
        with pytest.raises(ConfigError, match="--peers Q9_9"):
            peers.check_peers([ways.Peer("Q9_9")])
    else:
        with pytest.raises(UserError, match="llama-cpp"):
            peers.check_peers([ways.Peer("Q4_0")])


def test_bits_are_those_that_files_store(script, tiny_model, tmp_path):
    making, model = script("accuracy_making"), tiny_model("llama", tie_word_embeddings=True)
    specs = [VariantSpec(name=name, group_size=32, embeddings="int8").resolved() for name in ("int4", "gguf-q5_0")]
    places = {spec.name: tmp_path / spec.name for spec in specs}
    quantize_checkpoint(model, specs, places, linear_weights(model), tables=table_weights(model))
    assert making.stored_bits(model, model) == {"layers": 16, "tables": 16}
    of_int4, of_gguf = (making.stored_bits(places[spec.name], model) for spec in specs)
    width = table_weights(model)["model.embed_tokens.weight"][1]
    assert of_int4["layers"] == 4 + 2 * 16 / 32 and of_int4["tables"] == 8 + 40 / width  # a scale and a zero per row
    assert of_gguf == {"layers": 5.5, "tables": 8.5}
    with pytest.raises(ModelError, match="has no model.layers.2"):
        making.stored_bits(places["int4"], tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=True))


def test_rise_that_is_small_for_its_divergence_is_marked(script, benchmark, capsys):
    def row(label, rise, kl):
        quality = Quality(tokens=9, perplexity=Estimate(12, 1), rise=Estimate(rise, 0.01), kl=Estimate(kl, 0.01))
        result = ModelResult(size_bytes=10**6, quality={"general": quality})
        return benchmark.figures(script("accuracy_making").Row(label, "fast", result, second=quality))

    rows = [row("honest", 0.05, 0.05), row("flattered", 0.038, 0.047)]
    assert [found["flattered"] for found in rows] == [False, True]
    assert rows[1]["loss_to_kl"] == pytest.approx(0.79, abs=0.01)
    script("accuracy_tables").show(rows, [("", ())], None)
    lines = capsys.readouterr().out.splitlines()
    assert sum("0.79*" in line for line in lines if "flattered" in line) == 1
    assert not any("*" in line for line in lines if "honest" in line)


@pytest.mark.slow
def test_roundings_are_compared_without_and_with_calibration(script, tiny_model, tmp_path):
    rows = script("benchmark_roundings").measure(str(tiny_model("llama")), tmp_path, every=6, tokens=512)
    ratios = {(row["rounding"], row["calibrated"]): row["ratio_to_rtn"] for row in rows if row["group_size"] == 32}
    assert set(ratios) == {("rtn", False), ("hqq", False), ("search", False), ("search", True), ("gptq", True)}
    assert ratios["gptq", True] < ratios["search", True] < ratios["search", False] < ratios["rtn", False] == 1


def test_frontier_keeps_undominated_variants(script):
    points = [(10, 0.0), (5, 1.0), (4, 5.0), (6, 2.0), (4, 6.0), (5, 0.5)]
    assert script("accuracy_picture").frontier(points) == [(4, 5.0), (5, 0.5), (10, 0.0)]


def test_picture_shows_losses_of_any_sign(script, tmp_path):
    rows = [
        {"way": f"way {n}", "kind": "fast", "peer": n > 1, "tried": False, "bits": {}, "passed": n > 0,
         "size_bytes": n + 1, "rise": {"value": rise, "stderr": error}, "kl": {"value": kl, "stderr": error}}
        for n, (rise, kl, error) in enumerate([(0.2, 0.1, 0.01), (-0.001, 0.0, 0.002), (0.1, 0.1, None)])
    ]  # fmt: skip
    base = {"way": "base", "kind": "base", "peer": False, "rise": None}
    script("accuracy_picture").draw([base, *rows], "title", 10, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_licences_are_documents_without_common_paragraphs(script):
    found = list(script("accuracy_second_text").licences())
    assert found == list(script("accuracy_second_text").licences())
    assert len(found) > 4 and all(len(text) >= 2000 for text in found)
    paragraphs = [part for text in found for part in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs) and "\n\n\n" not in "".join(found)


def test_reordered_model_gives_the_same_logits(benchmark, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    source, reordered, changed = tiny_model("llama"), tmp_path / "reordered", tmp_path / "changed"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    reorder_channels(model)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    model.save_pretrained(reordered)
    shutil.copytree(source, changed)
    tensors = load_file(changed / "model.safetensors")
    (name,) = [name for name in tensors if "layers.0.mlp.up_proj" in name]
    save_file({**tensors, name: tensors[name].flip(0)}, changed / "model.safetensors", {"format": "pt"})
    assert benchmark.logits_moved(source, reordered)["moved"] < 1e-5
    assert benchmark.logits_moved(source, changed)["moved"] > benchmark.MOVED


@pytest.mark.slow
def test_variants_and_peers_are_measured_on_two_texts_and_drawn(cold, tiny_model, tmp_path):
    general, second = tmp_path / "general.txt", tmp_path / "second.txt"
    general.write_text(general_text())
    second.write_text(general_text(41, 25))
    peers = "Q4_0,Q4_0:imatrix" if is_installed("llama_cpp") else ""
    command = [sys.executable, SCRIPTS / "benchmark_accuracy.py", tiny_model("llama"), "--samples", "1"]
    unmade = 'int4:keep=["nothing"]'  # no layer has that name
    command += ["--variants", f"int4:32:rtn,{unmade},int4:32:search:calibrated:embeddings=int8"]
    command += ["--peers", peers, "--second", second]
    command += ["--set", "quantize.gate.rise=0.0001", "--set", f"evaluate.general={general}"]
    command += ["--set", "quantize.calibration.tokens=1024", "--output", tmp_path / "out"]
    found = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        found.append((tmp_path / "out" / "accuracy.json").read_text())
    assert found[0] == found[1] and "done before" in done.stdout
    rows = json.loads(found[0])["ways"]
    names = ["base", "int4 g32 rtn", "int4 g32 search embeddings int8 calibrated"]
    assert ["nothing" in reason for reason in json.loads(found[0])["missing"]] == [True]
    assert [row["way"] for row in rows][:3] == names
    assert [row["passed"] for row in rows][1:3] == [False, False] and "FAIL" in done.stdout
    assert all(row["token_seconds"] and row["peak_memory_bytes"] and row["bits"] and row["second"] for row in rows)
    assert [sorted(row["making"]["steps"]) for row in rows][1:3] == [["quantize"], ["calibrate", "quantize"]]
    assert all(row["making"]["seconds"] > 0 and row["making"]["peak_memory_bytes"] > 10**7 for row in rows[1:])
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    if peers:
        assert [row["way"] for row in rows[3:]] == ["llama.cpp Q4_0", "llama.cpp Q4_0 imatrix"]
        assert rows[3]["kl"] != rows[4]["kl"] and rows[3]["size_bytes"] == pytest.approx(
            rows[4]["size_bytes"], rel=0.01
        )
