"""Two models on the same examples: paired by token, or where their tokens differ, by example in bits per byte."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from pipeline.config_file import parse_config
from pipeline.data import Example, load_examples, write_examples
from pipeline.errors import DataError
from pipeline.events import Events
from pipeline.live import Inputs, Live, note
from pipeline.retrain import better
from pipeline.stages import compare
from pipeline.workspace import Workspace


@pytest.fixture
def held_out(tmp_path):
    """`held_out(new, live)`: both compared, as the stage does it, on 12 examples of 48."""
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}, of course."} for n in range(48)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measure(new: Path, live: Path, **settings) -> dict:
        tree = {"name": "tiny", "model": {"source": str(new)}, "data": {"source": str(path), "held_out": 0.25}}
        config = parse_config({**tree, **settings}, "")
        data = load_examples(config.data)
        with Workspace.claim(tmp_path / "tiny", config) as workspace:
            workspace.data.mkdir(exist_ok=True)
            write_examples(workspace.data / "held_out.jsonl", data.held_out)
            workspace.write_measurement("data", {"fingerprint": data.fingerprint})
            shutil.copytree(new, workspace.release, dirs_exist_ok=True)
            there = Live(str(live), None, "model", {"results": {"data": {"fingerprint": data.fingerprint}}})
            note(workspace, there, Inputs(config, "base", "data"))
            compare.run(config, workspace, Events(workspace.events_path, "tiny"), ())
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
    assert (figures["unit"], figures["paired_by"], figures["examples"]) == ("nats per token", "token", 12)
    assert figures["difference"]["value"] == pytest.approx(figures["new"]["value"] - figures["live"]["value"], abs=1e-5)
    # What both find hard alike does not blur the difference.
    assert 0 < figures["difference"]["stderr"] < math.hypot(figures["new"]["stderr"], figures["live"]["stderr"])


def test_models_with_other_tokens_are_compared_in_bits_per_byte_of_the_answers(held_out, tiny_model, tmp_path):
    new, live = tiny_model("llama"), tiny_model("gemma3_text")
    figures = held_out(new, live)
    assert (figures["unit"], figures["paired_by"], figures["examples"]) == ("bits per byte", "example", 12)
    config = parse_config(
        {"name": "t", "model": {"source": "a/b"}, "data": {"source": str(tmp_path / "rows.jsonl"), "held_out": 0.25}},
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
    assert not better(figures, margin=0)


def test_examples_that_do_not_fit_are_left_out_and_with_fewer_than_two_there_is_no_comparing(held_out, tiny_model):
    with pytest.raises(DataError, match="fewer than two held-out examples"):
        held_out(tiny_model("llama"), tiny_model("llama"), train={"max_length": 40})


@pytest.mark.parametrize(
    ("difference", "margin", "is_better"),
    [((-0.21, 0.1), 2, True), ((-0.19, 0.1), 2, False), ((-0.19, 0.1), 1, True), ((0.5, 0.1), 2, False)],
)
def test_better_is_lower_by_more_than_the_margin_in_errors_of_the_difference(difference, margin, is_better):
    value, stderr = difference
    assert better({"difference": {"value": value, "stderr": stderr}}, margin) is is_better
