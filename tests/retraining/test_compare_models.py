"""Comparison of two models: paired by token, or by example in bits per byte."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config.loader import parse_config
from pipeline.data import Example, load_examples, write_examples
from pipeline.errors import DataError, ModelError
from pipeline.evaluation.model_result import Estimate
from pipeline.evaluation.results import Comparison
from pipeline.hub.tree import Tree
from pipeline.publishing.published_model import PublishedModel
from pipeline.retraining.decision import better
from pipeline.retraining.input_changes import Inputs
from pipeline.tracking.events import Events
from pipeline.workflow.baseline import note
from pipeline.workflow.stages import compare_published
from pipeline.workflow.workspace import Workspace


@pytest.fixture
def held_out(tmp_path):
    """`held_out(new, live)`: both compared, as the stage does it, on 24 of 48 prompts with so many `answers` each."""
    path = tmp_path / "rows.jsonl"

    def measure(new: Path, live: Path, answers: int = 1, prompts: int = 48, **settings) -> dict:
        rows = [
            {"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}, of course{'!' * m}."}
            for n in range(prompts)
            for m in range(answers)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {"name": "tiny", "model": {"source": str(new)}, "data": {"source": str(path), "held_out": 0.5}}
        config = parse_config({**tree, **settings}, "")
        data = load_examples(config.data)
        with Workspace.claim(tmp_path / "tiny", config) as workspace:
            workspace.data.mkdir(exist_ok=True)
            write_examples(workspace.data / "held_out.jsonl", data.held_out)
            workspace.write_measurement("data", {"fingerprint": data.fingerprint})
            shutil.copytree(new, workspace.release, dirs_exist_ok=True)
            there = PublishedModel(Tree(str(live), None, {}), {"results": {"data": {"fingerprint": data.fingerprint}}})
            note(workspace, there, Inputs(config, "base", "data").to_dict())
            compare_published.run(config, workspace, Events(workspace.events_path, "tiny"), ())
            return workspace.read_measurement("retraining")

    return measure


def by_hand(model: Path, example: Example) -> tuple[float, int]:
    """Nats that a model needs for the answer of an example after its question, and how many tokens that are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole, asked = (
        tokenizer.apply_chat_template(m, add_generation_prompt=g, return_dict=False)
        for m, g in ((list(example.messages), False), (list(example.messages[:-1]), True))
    )
    if tokenizer.decode(whole).endswith("\n"):  # after the end of the turn; nothing is learned of it
        whole = whole[:-1]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)(ids).logits.float()
    nll = -logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(nll[len(asked) - 1 :].sum()), len(whole) - len(asked)


def test_models_with_the_same_tokens_are_paired_by_token(held_out, tiny_model):
    new, live = tiny_model("llama"), tiny_model("llama", rms_norm_eps=0.01)  # nearly the same
    figures = held_out(new, live)
    assert (figures["unit"], figures["paired_by"], figures["examples"]) == ("nats per token", "token", 24)
    assert figures["difference"]["value"] == pytest.approx(figures["new"]["value"] - figures["live"]["value"], abs=1e-5)
    # What both find hard alike does not blur the difference.
    assert 0 < figures["difference"]["stderr"] < math.hypot(figures["new"]["stderr"], figures["live"]["stderr"])


def test_answers_to_one_prompt_are_not_taken_for_as_many_prompts(held_out, tiny_model):
    new, live = tiny_model("llama"), tiny_model("llama", rms_norm_eps=0.01)
    with pytest.raises(DataError, match="too few held-out prompts .*8; 16 are needed.. Try: raise data.held_out"):
        held_out(new, live, answers=3, prompts=16)


@pytest.mark.parametrize("other", [("llama", {"rms_norm_eps": 0.01}), ("gemma3_text", {})], ids=["token", "prompt"])
def test_the_error_is_that_of_a_sample_of_prompts(held_out, tiny_model, other):
    """Three nearly equal answers to each prompt tell hardly more than one, which would else look 1.7 times as sure."""
    architecture, changes = other
    new, live = tiny_model("llama"), tiny_model(architecture, **changes)
    one, three = (held_out(new, live, answers=n, evaluate={"max_tokens": 10**6}) for n in (1, 3))
    assert (three["examples"], three["prompts"], one["prompts"]) == (72, 24, 24)
    assert three["difference"]["stderr"] == pytest.approx(one["difference"]["stderr"], rel=0.2)


def test_comparison_uses_the_device_of_the_run(held_out, tiny_model):
    if torch.cuda.is_available():
        figures = held_out(tiny_model("llama"), tiny_model("llama"), evaluate={"device": "cpu"})
        assert figures["device"] == "cpu"
    else:
        with pytest.raises(ModelError, match="cuda"):
            held_out(tiny_model("llama"), tiny_model("llama"), evaluate={"device": "cuda"})


def test_models_with_other_tokens_are_compared_in_bits_per_byte_of_the_answers(held_out, tiny_model, tmp_path):
    new, live = tiny_model("llama"), tiny_model("gemma3_text")
    figures = held_out(new, live)
    assert (figures["unit"], figures["paired_by"], figures["examples"]) == ("bits per byte", "prompt", 24)
    config = parse_config(
        {"name": "t", "model": {"source": "a/b"}, "data": {"source": str(tmp_path / "rows.jsonl"), "held_out": 0.5}},
        "",
    )
    examples = load_examples(config.data).held_out
    size = sum(len(example.learned()[0].encode()) for example in examples)
    for side, model in (("new", new), ("live", live)):
        bits = sum(by_hand(model, example)[0] for example in examples) / math.log(2)
        assert figures[side]["value"] == pytest.approx(bits / size, rel=2e-2)  # of bf16, computed otherwise


def test_a_model_is_no_better_than_itself(held_out, tiny_model):
    figures = held_out(tiny_model("llama"), tiny_model("llama"))
    assert figures["difference"] == {"value": 0.0, "stderr": 0.0}
    assert not better(Comparison.model_validate(figures), margin=0)


def test_examples_that_do_not_fit_are_left_out_and_with_too_few_there_is_no_comparing(held_out, tiny_model):
    with pytest.raises(
        DataError, match="too few of 24 held-out prompts fit into train.max_length 40 tokens .0; 16 are needed"
    ):
        held_out(tiny_model("llama"), tiny_model("llama"), train={"max_length": 40})


@pytest.mark.parametrize(
    ("difference", "margin", "is_better"),
    [((-0.21, 0.1), 2, True), ((-0.19, 0.1), 2, False), ((-0.19, 0.1), 1, True), ((0.5, 0.1), 2, False)],  # of 1000
)
def test_better_is_lower_by_more_than_the_margin_in_errors_of_the_difference(difference, margin, is_better):
    value, stderr = difference
    assert better(Comparison(difference=Estimate(value, stderr), prompts=1000, freedom=999.0), margin) is is_better
