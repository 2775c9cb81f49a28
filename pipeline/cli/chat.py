"""A conversation with a model on the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.config.catalog import LLAMA_CPP

Messages = list[dict[str, str]]
Answer = Callable[[Messages], str]  # prints the answer while it is generated

CONTEXT = 8192  # most tokens of a conversation in llama.cpp, which reserves memory for all of them


def chat(source: str, variant: str | None, device: str, new_tokens: int, console: Console) -> None:
    """Read questions and print answers, until an empty line or the end of the input.

    Raises:
        ModelError: if the model or the variant does not exist, or has no chat template.
        MissingExtra: if the variant needs llama-cpp-python and that is not installed.
    """
    from pipeline.errors import ModelError
    from pipeline.inference.load import engine_of

    with console.status("loading the model"):
        if variant and engine_of(variant) == LLAMA_CPP:
            if device not in ("auto", "cpu"):
                raise ModelError(f"{variant}: llama.cpp runs it on the CPU only. Try: leave out --device")
            answer, place = _in_llama_cpp(source, variant, new_tokens), "cpu in llama.cpp"
        else:
            answer, place = _in_transformers(source, variant, device, new_tokens)
    console.print(f"[dim]{escape(source)} {variant or ''} on {place}; an empty line ends the chat[/]")
    messages: Messages = []
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        messages.append({"role": "user", "content": question})
        try:
            messages.append({"role": "assistant", "content": answer(messages)})
        except KeyboardInterrupt:  # stops this answer, not the chat
            messages.pop()
            console.print()


def _in_transformers(source: str, variant: str | None, device: str, new_tokens: int) -> tuple[Answer, str]:
    from pipeline.data.template_choice import default_template
    from pipeline.errors import ModelError
    from pipeline.inference.load import load

    model: Any
    tokenizer: Any
    model, tokenizer = load(source, variant, device)
    if (template := default_template(tokenizer)) is None:
        raise ModelError(f"{source}: no chat template, so the model cannot chat")
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(_visible(text), stream_end)

    def answer(messages: Messages) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id or 0
        )
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer, str(model.device)


def _in_llama_cpp(source: str, variant: str, new_tokens: int) -> Answer:
    """Return answers of llama.cpp, with the tokenizer, chat template and stop tokens of the file."""
    from pipeline.errors import ModelError
    from pipeline.inference import llama_cpp
    from pipeline.inference.load import locate_file
    from pipeline.system import hardware

    api = llama_cpp.library()
    path = locate_file(source, variant)
    llama_cpp.check(path)
    context = min(CONTEXT, llama_cpp.positions(path))
    model = api.Llama(str(path), n_ctx=context, n_threads=hardware.cores(), n_gpu_layers=0, verbose=False)
    if "tokenizer.chat_template" not in model.metadata:
        raise ModelError(f"{path}: no chat template, so the model cannot chat")

    def answer(messages: Messages) -> str:
        parts = []
        try:
            for piece in model.create_chat_completion(messages, max_tokens=new_tokens, stream=True):
                parts.append(piece["choices"][0]["delta"].get("content") or "")
                print(_visible(parts[-1]), end="", flush=True)
        except ValueError as error:  # the chat has become longer than the context
            raise ModelError(f"{path}: {error}") from None
        print()
        return "".join(parts)

    return answer


def _visible(text: str) -> str:
    """Return a text with escapes in place of what a terminal would obey; a model may write anything."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
