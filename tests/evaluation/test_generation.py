"""Sample answers, and the speed of reading and writing."""

from __future__ import annotations

from pipeline.evaluation import generation
from pipeline.inference.load import load


def test_speed_is_measured_within_the_positions_that_a_model_has(tiny_model):
    model, _ = load(tiny_model("llama", max_position_embeddings=48))
    figures = generation.speed(model, prompt_tokens=256, new_tokens=32, repeats=1)
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (24, 24)
    assert figures["prefill_tokens_per_second"] > 0 and figures["decode_tokens_per_second"] > 0


def test_answers_are_greedy_and_without_the_prompt(tiny_model):
    model, tokenizer = load(tiny_model("llama"))
    first, again = (generation.answers(model, tokenizer, ["Hello?", "Who?"], new_tokens=8) for _ in range(2))
    assert first == again and [a.prompt for a in first] == ["Hello?", "Who?"]
    assert all("im_start" not in a.answer and "Hello" not in a.answer for a in first)
