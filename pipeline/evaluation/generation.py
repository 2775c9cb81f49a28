"""Text that a loaded model writes: sample answers, and how fast it reads and writes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from pipeline.data.template_choice import default_template
from pipeline.data.template_style import on_one_day
from pipeline.errors import ConfigError
from pipeline.evaluation.model_result import Answer
from pipeline.inference.throughput import NEW_TOKENS, PROMPT_TOKENS, REPEATS, tokens_per_second
from pipeline.models.context import context_length
from pipeline.models.safe_loading import open_generation_config

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

ANSWER_TOKENS = 64


@torch.no_grad()
def speed(
    model: PreTrainedModel,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
) -> dict[str, float]:
    """Return median tokens per second at batch size 1: for reading a prompt, and for writing after it.

    Prompt and answer are shortened to the positions of the model.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)

    def read(count: int) -> Any:
        return model(prompt[:, :count], use_cache=True, logits_to_keep=1)

    def write(out: Any) -> Any:
        token = out.logits[:, -1:].argmax(-1)
        return model(token, past_key_values=out.past_key_values, use_cache=True)

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    limit = getattr(model.config, "max_position_embeddings", None)
    return tokens_per_second(read, write, limit, prompt_tokens, new_tokens, repeats, now)


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int = ANSWER_TOKENS
) -> list[Answer]:
    """Return greedy answers, without sampling, so that answers differ only if models differ.

    A model without a chat template continues the prompt as plain text.

    Raises:
        ConfigError: if a prompt leaves no room for an answer in the model's context.
    """
    found = []
    context = context_length(model.config.to_dict())
    generate = cast(Any, model.generate)
    for prompt in prompts:
        inputs = question(tokenizer, prompt).to(model.device)
        room = answer_room(prompt, inputs["input_ids"].shape[1], context, new_tokens)
        output = generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
        reply = output[0, inputs["input_ids"].shape[1] :].tolist()
        found.append(Answer(prompt=prompt, answer=text_of(tokenizer, reply)))
    return found


def check_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
    """Check that every prompt leaves room for an answer in the model's context.

    Raises:
        ConfigError: for the first one that does not.
    """
    for prompt in prompts:
        answer_room(prompt, question(tokenizer, prompt)["input_ids"].shape[1], context)


def answer_room(prompt: str, prompt_tokens: int, context: int | None, new_tokens: int = ANSWER_TOKENS) -> int:
    """Return the tokens that an answer may have: `new_tokens`, or those that the context leaves.

    Raises:
        ConfigError: if the context leaves none.
    """
    if context is not None and prompt_tokens >= context:
        raise ConfigError(
            f"evaluate.prompts: {prompt[:40]!r} has {prompt_tokens} tokens, and the model's context is {context}. "
            "Try: a shorter question"
        )
    return new_tokens if context is None else min(new_tokens, context - prompt_tokens)


def text_of(tokenizer: PreTrainedTokenizerBase, reply: list[int]) -> str:
    """Return the text of an answer, without special tokens."""
    return cast(str, tokenizer.decode(reply, skip_special_tokens=True)).strip()


def question(tokenizer: PreTrainedTokenizerBase, prompt: str) -> BatchEncoding:
    """Return the input of a model that answers `prompt`: `input_ids` (1, T) and their mask."""
    if not (template := default_template(tokenizer)):
        return tokenizer(prompt, return_tensors="pt")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=on_one_day(template),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    return cast("BatchEncoding", chat)


def stop_tokens(folder: Path) -> set[int]:
    """Return the tokens at which transformers ends an answer of the model in `folder`."""
    ends = open_generation_config(folder).eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}
