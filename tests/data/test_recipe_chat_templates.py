"""Chat templates of the recipes' models: what they render, and which tokens are learned."""

from __future__ import annotations

import importlib.util
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.config.loader import load_config
from pipeline.data.encode import NO_LOSS, encode_examples
from pipeline.data.example import Example
from pipeline.errors import DataError
from tests.support.models import write_tokenizer

# The templates as the models' own repositories have them, which trl carries for its own checks.
REAL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
# Of the two models that it does not carry, what matters here: SmolLM3's marks its answers itself, begins with the
# date, and thinks unless told not to; TinyLlama's ends every turn with the tokenizer's end of text.
SMOLLM3 = (
    "{% set told = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set thinks = '/no_think' not in told %}"
    "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '\n' }}"
    "{{ told.replace('/no_think', '') or ('Think first.' if thinks else 'Answer.') }}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}"
    "{{ '' if thinks else '<think>\n\n</think>\n' }}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINYLLAMA = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}"
)
TEMPLATES = {
    "gemma-3-1b": REAL / "gemma3.jinja",
    "llama-3.2-1b": REAL / "llama3_2.jinja",
    "qwen3-1.7b": REAL / "qwen3.jinja",
    "qwen3-4b": REAL / "qwen3_instruct_2507.jinja",
    "smollm3-3b": SMOLLM3,
    "tinyllama-1.1b": TINYLLAMA,
}


@pytest.fixture
def tokenizer_of(tmp_path):
    """`tokenizer_of(recipe)`: a tokenizer of single bytes with the chat template of the recipe's model."""
    from transformers import AutoTokenizer

    def make(recipe):
        write_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        template = TEMPLATES[recipe]
        tokenizer.chat_template = template if isinstance(template, str) else template.read_text(encoding="utf-8")
        return tokenizer

    return make


def conversation(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return Example(tuple([{"role": "system", "content": system}] * (system is not None) + turns))


def learned(tokenizer, recipe, example) -> list[str]:
    """The runs of text that the recipe's loss is taken on."""
    (encoded,) = encode_examples([example], tokenizer, load_config(recipe).train.loss_on, 4096).examples
    runs, inside = [], False
    for token in encoded.labels:
        if token != NO_LOSS:
            runs = [*runs[:-1], [*runs[-1], token]] if inside else [*runs, [token]]
        inside = token != NO_LOSS
    return [tokenizer.decode(run) for run in runs]


PLAIN = {
    "gemma-3-1b": "Four.<end_of_turn>",
    "llama-3.2-1b": "Four.<|eot_id|>",
    "qwen3-1.7b": "<think>\n\n</think>\n\nFour.<|im_end|>",
    "qwen3-4b": "Four.<|im_end|>",
    "smollm3-3b": "<|im_start|>assistant\nFour.<|im_end|>",
    "tinyllama-1.1b": "Four.<|im_end|>",  # the end of text of the tests' tokenizer
}


@pytest.mark.parametrize("recipe", TEMPLATES)
def test_a_plain_answer_is_learned_with_its_end_of_turn_and_nothing_of_the_question(tokenizer_of, recipe):
    tokenizer = tokenizer_of(recipe)
    (text,) = learned(tokenizer, recipe, conversation("Two plus two?", "Four."))
    assert text.lstrip("\n") == PLAIN[recipe]


@pytest.mark.parametrize("recipe", TEMPLATES)
def test_earlier_answers_are_learned_unless_thinking_is_stripped(tokenizer_of, recipe):
    texts = learned(tokenizer_of(recipe), recipe, conversation("One?", "First.", "Two?", "Second."))
    assert "Second." in texts[-1]
    assert ["First." in text for text in texts] == ([False] if recipe == "qwen3-1.7b" else [True, False])


def test_qwen3_learns_the_thoughts_of_an_answer_that_has_some(tokenizer_of):
    answer = "<think>\nTwo and two.\n</think>\n\nFour."
    (text,) = learned(tokenizer_of("qwen3-1.7b"), "qwen3-1.7b", conversation("Two plus two?", answer))
    assert text == answer + "<|im_end|>"


def test_smollm3_is_told_not_to_think_by_its_system_message(tokenizer_of):
    tokenizer = tokenizer_of("smollm3-3b")
    (text,) = learned(tokenizer, "smollm3-3b", conversation("Two plus two?", "Four.", system="/no_think"))
    assert text == "<|im_start|>assistant\n<think>\n\n</think>\nFour.<|im_end|>"


def test_gemma_has_the_system_message_in_the_question_and_refuses_two_questions_in_a_row(tokenizer_of):
    tokenizer = tokenizer_of("gemma-3-1b")
    (text,) = learned(tokenizer, "gemma-3-1b", conversation("Two plus two?", "Four.", system="Be brief."))
    assert text == "Four.<end_of_turn>"
    twice = Example((*[{"role": "user", "content": "Well?"}] * 2, {"role": "assistant", "content": "Four."}))
    with pytest.raises(DataError, match="alternate"):
        learned(tokenizer, "gemma-3-1b", twice)


@pytest.mark.parametrize("recipe", ["llama-3.2-1b", "smollm3-3b"])
def test_the_same_conversation_gives_the_same_tokens_tomorrow(tokenizer_of, recipe, monkeypatch):
    from transformers.utils import chat_template_utils

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 5, 17)

    tokenizer, example = tokenizer_of(recipe), conversation("Two plus two?", "Four.")
    today = encode_examples([example], tokenizer, "auto", 4096).examples
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    messages = [{"role": "user", "content": "?"}]
    assert "2031" in tokenizer.apply_chat_template(messages, tokenize=False)
    assert encode_examples([example], tokenizer, "auto", 4096).examples == today
