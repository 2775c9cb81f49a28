"""Measuring within a time limit: fewer tokens, the same for every model of a run."""

from __future__ import annotations

import itertools

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import Config
from pipeline.evaluation import texts
from pipeline.inference.throughput import tokens_per_second
from pipeline.workflow.stages.inputs import run_texts
from pipeline.workflow.workspace import Workspace


def config_for(**evaluate) -> Config:
    return Config.model_validate(
        {"name": "timed", "model": {"source": "unused/unused"}, "data": None, "evaluate": evaluate}
    )


def tokens_of(config: Config, workspace: Workspace, tokenizer) -> int:
    return sum(len(s.input_ids) for s in texts.all_texts(config, run_texts(workspace), tokenizer, None)["general"])


def test_plan_is_made_again_for_another_model_and_not_for_another_text(model_and_tokenizer, workspace):
    config = config_for(max_tokens=2048, max_minutes=0.00001)
    texts.plan_tokens(config, run_texts(workspace), *model_and_tokenizer)
    kept = workspace.read_measurement("texts")
    workspace.write_measurement("texts", kept | {"max_tokens": 512})
    other_text = config.evaluate.model_copy(update={"general": "builtin:other"})
    assert (
        texts.apply_plan(
            config.model_copy(update={"evaluate": other_text}), workspace.read_measurement("texts")
        ).evaluate.max_tokens
        == 512
    )
    larger = config.model_copy(update={"model": config.model.model_copy(update={"source": "larger/larger"})})
    texts.plan_tokens(larger, run_texts(workspace), *model_and_tokenizer)
    assert workspace.read_measurement("texts")["max_tokens"] == 1024


def test_configuration_that_measures_nothing_is_left_as_it_is(workspace):
    config = Config.model_validate(config_for().model_dump() | {"data": None, "evaluate": None})
    workspace.write_measurement("texts", {"asked": None, "max_tokens": 1})
    assert texts.apply_plan(config, workspace.read_measurement("texts")) is config


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    made = Workspace(tmp_path)
    made.measurements.mkdir()
    return made


@pytest.fixture
def model_and_tokenizer(tiny_model):
    folder = tiny_model("llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("minutes", "tokens"), [(0.00001, 1024), (100, 2048), (None, 2048)])
def test_as_many_tokens_are_measured_as_fit(model_and_tokenizer, workspace, minutes, tokens):
    config = config_for(max_tokens=2048, max_minutes=minutes)
    texts.plan_tokens(config, run_texts(workspace), *model_and_tokenizer)
    assert tokens_of(config, workspace, model_and_tokenizer[1]) == tokens


def test_plan_is_made_once_and_holds_for_what_was_asked(model_and_tokenizer, workspace):
    asked = {"max_tokens": 2048, "max_minutes": 0.00001}
    texts.plan_tokens(config_for(**asked), run_texts(workspace), *model_and_tokenizer)
    kept = workspace.read_measurement("texts")
    assert kept["max_tokens"] == 1024
    workspace.write_measurement("texts", kept | {"max_tokens": 512})
    texts.plan_tokens(config_for(**asked), run_texts(workspace), *model_and_tokenizer)
    assert tokens_of(config_for(**asked), workspace, model_and_tokenizer[1]) == 512
    assert tokens_of(config_for(max_tokens=768), workspace, model_and_tokenizer[1]) == 768


def test_speed_is_the_median_of_rounds_after_one_that_warms_up():
    clock = itertools.count()
    figures = tokens_per_second(lambda n: n, lambda s: s, None, 256, 32, 3, lambda: next(clock) * 1e-3)
    assert figures["prefill_tokens_per_second"] == pytest.approx(256_000)
    assert figures["decode_tokens_per_second"] == pytest.approx(1000)
    assert figures["new_tokens"] == 32


@pytest.mark.parametrize(
    ("prefill", "step", "rounds", "written"), [(20.0, 1.0, 1, 4), (1.0, 0.5, 1, 8), (0.1, 0.1, 4, 32)]
)
def test_long_rounds_are_not_repeated(prefill, step, rounds, written):
    now, reads = [0.0], []

    def read(count):
        reads.append(count)
        now[0] += prefill

    def write(_):
        now[0] += step

    figures = tokens_per_second(read, write, None, now=lambda: now[0])
    assert len(reads) == rounds and figures["new_tokens"] == written
    assert figures["prefill_tokens_per_second"] == pytest.approx(256 / prefill)
    assert figures["decode_tokens_per_second"] == pytest.approx(1 / step)
