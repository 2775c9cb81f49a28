"""Talk to a model on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


def chat(
    source: str, variant: str | None, device: str, new_tokens: int, console: Console, compile: bool = False
) -> None:
    """Read questions, stream answers, until an empty line or the end of the input.

    Raises:
        ModelError: where there is no such model or variant, or where it has no chat template.
    """
    from pipeline.errors import ModelError
    from pipeline.loading import load

    with console.status("loading"):
        model, tokenizer = load(source, variant, device, compile=compile)
    if tokenizer.chat_template is None:
        raise ModelError(f"{source}: has no chat template, so it cannot be talked to")
    from transformers import TextStreamer

    console.print(f"[dim]{escape(source)} {variant or ''} on {model.device}; an empty line ends it[/]")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            output = model.generate(
                **inputs, max_new_tokens=new_tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id or 0
            )
        except KeyboardInterrupt:  # stops this answer, not the talk
            messages.pop()
            console.print()
            continue
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
