"""Base models as people have them: other ends of turns, and tokens beyond the embedding."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from pipeline.config.builders import quantize_config
from pipeline.config.loader import load_config
from pipeline.config.schema import Model
from pipeline.errors import ModelError, StageFailed
from pipeline.evaluation.generation import stop_tokens
from pipeline.models.gguf_metadata import read_dialogue, read_header
from pipeline.models.sources import fetch
from pipeline.publishing.ollama import modelfile
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run, run_one
from tests.support.checkpoints import rewrite
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
        quantize={"quality": "fast", "variants": ["int8", "gguf-q4_0"]},
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


def with_token(folder, token: str, **named: str):
    """Add a token to a tokenizer, and leave the embedding as it is."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(named) if named else tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(token)


def small_config(folder, model, **sections):
    """Return the configuration of a run that is over after one step."""
    train = {"method": "lora", "max_steps": 1, "packing": False}
    place = write_place(folder, model, train=train, evaluate={"max_tokens": 256, "prompts": []}, **sections)
    return load_config(str(place.config))


def test_pads_beyond_the_embedding_are_masked(tiny_model, tmp_path, monkeypatch):
    base = shutil.copytree(tiny_model("llama", vocab_size=259), tmp_path / "base")
    assert with_token(base, "[PAD]", pad_token="[PAD]") == 259  # one more than the last row
    monkeypatch.chdir(tmp_path)
    workspace = run_one(small_config(tmp_path, base), "train", start=run_stage_here)
    assert (workspace.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_token_beyond_the_embedding_is_named_before_training_and_measuring(tiny_model, tmp_path, monkeypatch, stage):
    base = shutil.copytree(tiny_model("llama", vocab_size=259), tmp_path / "base")
    with_token(base, "fox")
    monkeypatch.chdir(tmp_path)
    sections = {} if stage == "train" else {"data": None}
    config = small_config(tmp_path, base, quantize={"variants": []}, **sections)
    with pytest.raises(StageFailed, match="its tokenizer writes 'fox' as 259, and its embedding has only 259 rows"):
        run_one(config, stage, start=run_stage_here)


def test_pad_token_with_which_transformers_builds_no_model_is_named(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    change(base / "config.json", pad_token_id=272)
    with pytest.raises(ModelError, match="its pad_token_id lies beyond the rows of its embedding"):
        fetch(Model(source=str(base)), tmp_path)


@pytest.fixture
def several(tiny_model, tmp_path):
    """A base model with two chat templates, of which none is the default."""
    base = shutil.copytree(tiny_model("qwen3"), tmp_path / "base")
    text = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "additional_chat_templates").mkdir()
    for name in ("chat", "tool_use"):
        (base / f"additional_chat_templates/{name}.jinja").write_text(f"{{# {name} #}}{text}")
    return base


def test_several_templates_without_a_default_are_told_from_which_to_choose(several, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageFailed, match=r"several chat templates \(chat, tool_use\).* Try: data.chat_template=chat"):
        run_one(small_config(tmp_path, several), "train", start=run_stage_here)


def test_chosen_template_is_the_default_of_the_merged_model_and_the_others_come_along(several, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"source": "rows.jsonl", "held_out": 0.25, "chat_template": "chat"}
    config = small_config(tmp_path, several, data=data, quantize={"quality": "fast", "variants": ["int8", "gguf-q4_0"]})
    for stage in ("train", "merge"):
        workspace = run_one(config, stage, start=run_stage_here)
    for folder in (workspace.release, workspace.quantized / "int8"):
        templates = AutoTokenizer.from_pretrained(folder).chat_template
        assert templates.keys() == {"chat", "tool_use", "default"}
        assert templates["default"] == templates["chat"] != templates["tool_use"]
    (file,) = (workspace.quantized / "gguf-q4_0").glob("*.gguf")
    assert read_dialogue(file).template == templates["chat"]
    assert read_header(file).keys["tokenizer.chat_template.tool_use"] == templates["tool_use"]


def test_missing_tensor_is_named_before_the_first_step(tiny_model, tmp_path, monkeypatch):
    base = rewrite(tiny_model("llama"), tmp_path / "base", lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageFailed, match="its checkpoint has no 'model.norm.weight'"):
        run_one(small_config(tmp_path, base), "train", start=run_stage_here)


def test_missing_tensor_is_named_before_variants_are_written_without_measuring(tiny_model, tmp_path, monkeypatch):
    base = rewrite(tiny_model("llama"), tmp_path / "base", lambda tensors: tensors.pop("lm_head.weight"))
    monkeypatch.chdir(tmp_path)
    config = quantize_config(str(base), str(tmp_path / "out"), ["int8"], measure=False)
    with pytest.raises(StageFailed, match="its checkpoint has no 'lm_head.weight'"):
        run(config, output=tmp_path / "out", start=run_stage_here)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
