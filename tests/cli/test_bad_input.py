"""User errors: one clear line, exit code 2, and no work started."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import yaml

from pipeline.cli import main
from pipeline.config.schema import Config
from pipeline.errors import ModelError, install
from pipeline.tracking.events import Events
from pipeline.workflow.stages import train
from pipeline.workflow.workspace import Workspace

GOOD = {
    "name": "tiny",
    "model": {"source": "MODEL"},
    "data": {"source": "rows.jsonl"},
    "evaluate": {"general": "general.txt"},
}
ROW = {"prompt": "What is 1 plus 1?", "completion": "It is 2."}
ROWS = "".join(json.dumps({**ROW, "prompt": f"What is {n} plus 1?"}) + "\n" for n in range(20))


@pytest.fixture
def tunepress(tmp_path, monkeypatch, capfd, tiny_model):
    """`tunepress("run", "x.yaml")` runs the command here; gives its exit code and its lines on stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "general.txt").write_text("Words that say nothing. " * 200)

    def call(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["tunepress", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capfd.readouterr().err.strip().splitlines()

    call.write = lambda tree: _write(tmp_path, tree, tiny_model("llama"))
    call.folder = tmp_path
    return call


def _write(folder, tree: dict, model) -> None:
    text = yaml.safe_dump(tree).replace("MODEL", str(model))
    (folder / "x.yaml").write_text(text)


def _with(**sections) -> dict:
    return {**GOOD, **sections}


CONFIGURATIONS = {
    "an unknown key": (_with(train={"epoch": 2}), ["x.yaml", "train.epoch", "epochs"]),
    "a base that plain LoRA never saw": (
        _with(train={"method": "lora"}, merge={"base": "nf4"}), ["merge.base", "nf4", "lora"],
    ),
    "a model that is not there": (_with(model={"source": "./nowhere"}), ["nowhere", "no such folder"]),
    "a model that is no name": (_with(model={"source": "just-a-word"}), ["just-a-word", "user/model"]),
    "a package that is not installed": (
        _with(model={"source": "package:no_such_package/x.gguf"}), ["no-such-package", "pip install"],
    ),
    "a data file that is not there": (_with(data={"source": "./none.jsonl"}), ["none.jsonl", "no such file"]),
    "a general text that is not there": (_with(evaluate={"general": "none.txt"}), ["none.txt"]),
    "a repository without a token": (_with(publish={"repo": "ada/tiny"}), ["ada/tiny", "token", "hf auth login"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_broken_configuration_gives_one_line_and_begins_nothing(tunepress, name):
    tree, words = CONFIGURATIONS[name]
    tunepress.write(tree)
    code, lines = tunepress("run", "x.yaml")
    assert (code, len(lines)) == (2, 1), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tunepress.folder / "runs").exists()


def test_a_broken_data_file_gives_one_line_with_its_row_and_begins_nothing(tunepress):
    (tunepress.folder / "rows.jsonl").write_text('{"prompt": "a", "completion": }\n')
    tunepress.write(GOOD)
    code, (line,) = tunepress("run", "x.yaml")
    assert code == 2 and all(word in line for word in ("rows.jsonl", "line 1", "JSON"))
    assert not (tunepress.folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "none.yaml"), ["none.yaml", "demo"]),
        (("run", "x.yaml", "--set", "train.epochs"), ["train.epochs", "key=value"]),
        (("run", "x.yaml", "--set", "train.epochs.more=1"), ["train.epochs"]),
        (("status", "runs/none"), ["runs/none"]),
        (("publish", "runs/none"), ["runs/none"]),
        (("chat", "nothing-here"), ["nothing-here"]),
        (("chat", "runs", "--variant", "int3"), ["int3"]),
    ],
)
def test_a_wrong_argument_gives_one_line(tunepress, arguments, words):
    tunepress.write(GOOD)
    code, lines = tunepress(*arguments)
    assert (code, len(lines)) == (2, 1), lines
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(
    "package, variant, extra",
    [("gguf", "gguf-q4_0", "gguf"), ("gguf", "gguf-q6_k", "gguf"), ("llama_cpp", "gguf-q6_k", "llama-cpp")],
)
def test_a_package_that_a_variant_needs_is_named_before_any_work(tunepress, monkeypatch, package, variant, extra):
    find = importlib.util.find_spec
    there = {"gguf": True, "llama_cpp": True, package: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[name] if name in there else find(name))
    tunepress.write(_with(quantize={"variants": ["int8", variant]}))
    code, lines = tunepress("run", "x.yaml")
    assert code == 2 and len(lines) == 1
    assert f"{variant} needs a package that is not installed; run: {install(f'tunepress[{extra}]')}" in lines[0]
    assert not (tunepress.folder / "runs").exists()


def test_a_model_that_gguf_cannot_hold_is_refused_before_it_is_trained(tunepress, model_copy):
    pytest.importorskip("gguf")
    settings = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(settings | {"hidden_act": "relu"}))
    tree = _with(model={"source": str(model_copy)}, quantize={"variants": ["int8", "gguf-q4_0"]})
    refused_before_training(tunepress.folder, tree, "its activation is relu; llama.cpp computes llama with silu")


def test_a_model_whose_embeddings_cannot_be_quantized_is_refused_before_it_is_trained(tunepress, tiny_model):
    variants = [{"name": "int4", "embeddings": "int8"}]
    tree = _with(model={"source": str(tiny_model("gemma3_text"))}, quantize={"variants": variants})
    refused_before_training(tunepress.folder, tree, "cannot load a Gemma3TextScaledWordEmbedding in int8")


@pytest.mark.parametrize(
    "variant, quality, said",
    [
        ("int4", "fast", "int4: stock transformers cannot run experts in 4 bits"),
        ("w4a16", "calibrated", "w4a16: rounding gptq needs the inputs of every expert.* Try: quantize.quality=fast"),
    ],
)
def test_a_mixture_of_experts_is_refused_before_it_is_trained_to_be_quantized(
    tunepress, mixture, variant, quality, said
):
    tree = _with(model={"source": str(mixture)}, quantize={"variants": ["int8", variant], "quality": quality})
    refused_before_training(tunepress.folder, tree, said)


def refused_before_training(folder, tree: dict, reason: str) -> None:
    with Workspace.claim(folder / "runs" / "tiny", Config.model_validate(tree)) as workspace:
        with pytest.raises(ModelError, match=reason):
            train.run(Config.model_validate(tree), workspace, Events(workspace.events_path, "tiny"), ())
        assert not workspace.checkpoints.exists() and not workspace.adapter.exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("quantize", "MODEL"), "--output DIR"),
        (("quantize", "MODEL", "--output", "full"), "full: contains other files. Try: --output NEW_FOLDER"),
        (
            ("quantize", "MODEL", "--output", "out", "--variants", "int5"),
            "--variants int5: allowed are int8, int8-dynamic, int4",
        ),
        (("quantize", "MODEL", "--output", "out", "--group-size", "48"), "group_size 48: allowed are 32, 64, 128, 256"),
        (
            ("quantize", "MODEL", "--output", "out", "--variants", "int8", "--rounding", "search"),
            "none of int8 takes it",
        ),
        (("quantize", "MODEL", "--output", "out", "--rounding", "awq"), "--rounding awq: none of"),
        (("quantize", "./nowhere", "--output", "out"), "no such folder"),
        (("quantize", "demo", "--output", "out"), "demo: a configuration"),
        (("quantize", "MODEL", "--output", "out", "--set", "publish.repo=ada/x"), "a published model must be measured"),
        (("merge", "demo", "--base", "nf4"), "demo: a configuration, so --base does not apply"),
        (("merge", "MODEL", "--output", "out"), "merge BASE ADAPTER --output DIR"),
        (("merge", "MODEL", "./nowhere", "--output", "out"), "merge.adapter './nowhere': has no adapter_config.json"),
        (("merge", "MODEL", "MODEL", "--output", "out", "--base", "fp8"), "merge.base"),
        (("publish", "full", "--repo", "ada/x"), "not the folder of a run"),
        (("clean", "full"), "not the folder of a run"),
    ],
)
def test_impossible_request_gives_one_line_before_anything_is_written(tunepress, tiny_model, arguments, said):
    full = tunepress.folder / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    code, (line,) = tunepress(*(str(tiny_model("llama")) if a == "MODEL" else a for a in arguments))
    assert code == 2 and said in line
    assert not (tunepress.folder / "out").exists() and [p.name for p in full.iterdir()] == ["thesis.txt"]
