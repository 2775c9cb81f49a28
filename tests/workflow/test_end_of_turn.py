"""A base model that ends generation at another token than its chat template ends turns with."""

import json
import shutil

import pytest

from pipeline.config.loader import load_config
from pipeline.evaluation.generation import stop_tokens
from pipeline.models.gguf_metadata import read_dialogue
from pipeline.publishing.ollama import modelfile
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run_one
from tests.support.models import SPECIAL
from tests.support.runs import write_place

END_OF_TEXT, END_OF_TURN = 256, 258


def change(path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def base(tiny_model, tmp_path):
    """A tiny model whose end of text is not the end of its turns, as in base models of Qwen."""
    folder = shutil.copytree(tiny_model("qwen3"), tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        change(folder / name, eos_token_id=END_OF_TEXT)
    change(folder / "tokenizer_config.json", eos_token=SPECIAL[0])
    return folder


def test_merged_model_and_variants_stop_at_the_end_of_turn_that_was_learned(base, tmp_path, monkeypatch):
    place = write_place(
        tmp_path,
        base,
        train={"method": "lora", "max_steps": 1},
        evaluate={"max_tokens": 256, "prompts": []},
        quantize={"variants": ["int8", "gguf-q4_0"]},
    )
    monkeypatch.chdir(tmp_path)
    config = load_config(str(place.config))
    for stage in ("train", "merge"):  # which writes variants in its own pass
        workspace = run_one(config, stage, start=run_stage_here)
    for folder in (workspace.release, workspace.quantized / "int8"):
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [END_OF_TEXT, END_OF_TURN]
        assert stop_tokens(folder) == {END_OF_TEXT, END_OF_TURN}
    (file,) = (workspace.quantized / "gguf-q4_0").glob("*.gguf")
    assert read_dialogue(file).stops == (SPECIAL[0], SPECIAL[2])
    assert f'PARAMETER stop "{SPECIAL[2]}"' in modelfile({"gguf-q4_0": file})
