"""Modelfiles for Ollama: only turns that match the chat template, read as intended."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.models.gguf_metadata import read_dialogue
from pipeline.publishing.ollama import modelfile

gguf = pytest.importorskip("gguf")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KIND = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe \"kind\".<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (first if loop.first else '') + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (  # as tunepress gives it to a model without one
    "{% for m in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}{{ '### ' + m['role'] | capitalize + ':\n' "
    "+ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '.\n' }}" + CHATML
TALK = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model.\nA small one."},
    {"role": "user", "content": "Are you {{ sure }}?"},
]
SYSTEM = {"role": "system", "content": "Answer in one word."}


@pytest.fixture
def file(tmp_path):
    """`file(template)`: a GGUF that has nothing but a tokenizer of five tokens and a chat template."""

    def make(template: str | None = None, variant: str = "gguf-q4_0", **sampling: float) -> Path:
        path = tmp_path / f"tiny-{variant.removeprefix('gguf-').upper()}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list(["<s>", "</s>", "<|end|>", "a", 'say "so"'])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_eot_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_token_scores([0.0] * 5)
        if template is not None:
            writer.add_chat_template(template)
        for name, value in sampling.items():
            writer.add_float32(f"general.sampling.{name}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return make


def parsed(text: str) -> dict[str, list[str]]:
    """A Modelfile as Ollama's parser takes it: words in capitals, and texts in quotes that nothing escapes."""
    found: dict[str, list[str]] = {}
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        if line.startswith("#") or not line.strip():
            continue
        word, value = line.split(" ", 1)
        if word == "PARAMETER":
            word, value = value.split(" ", 1)
        while (said := unquoted(value.strip())) is None:
            value += next(lines)
        found.setdefault(word, []).append(said)
    return found


def unquoted(value: str) -> str | None:
    if value.startswith('"""'):
        return value[3:-3] if len(value) >= 6 and value.endswith('"""') else None
    if value.startswith('"'):
        return value[1:-1] if len(value) >= 2 and value.endswith('"') else None
    return value


def in_go(template: str, messages: list[dict], system: str = "") -> str:
    """What Go's text/template makes of the few marks that are used here."""
    marks = [m for m in re.split(r"(\{\{.*?\}\})", template) if m]

    def run(position: int, at: dict, live: bool) -> tuple[str, int]:
        """Text up to the `else` or `end` that closes this block, and where that is."""
        text = ""
        while position < len(marks):
            mark = marks[position]
            word = mark[2:-2].strip() if mark.startswith("{{") else None
            if word == "end" or (word or "").startswith("else"):
                return text, position
            position += 1
            if word is None:
                text += mark if live else ""
            elif word.startswith("range"):
                start, body = position, ""
                for i, message in enumerate(messages):
                    part, position = run(start, {**message, "i": i}, live)
                    body += part
                text, position = text + body, position + 1
            elif word.startswith("if"):
                done = False
                while True:
                    chosen = not done and holds(word, at)
                    done = done or chosen
                    part, position = run(position, at, live and chosen)
                    text, word = text + part, marks[position][2:-2].strip().removeprefix("else ")
                    position += 1
                    if word == "end":
                        break
            else:
                value = {".Role": at.get("role"), ".Content": at.get("content"), "$.System": system}[word]
                text += value if live else ""
        return text, position

    def holds(word: str, at: dict) -> bool:
        if found := re.fullmatch(r'if eq \.Role "(\w+)"', word):
            return at["role"] == found[1]
        return {"if $i": at["i"] > 0, "if and $.System (le $i 1)": bool(system) and at["i"] <= 1}[word]

    return run(0, {}, True)[0]


def as_ollama_asks(said: dict[str, list[str]], messages: list[dict]) -> str:
    """The text that Ollama gives to the model, with the token before it that llama.cpp adds."""
    if messages[0]["role"] != "system" and "SYSTEM" in said:
        messages = [{"role": "system", "content": said["SYSTEM"][0]}, *messages]
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return "<s>" + in_go(said["TEMPLATE"][0], messages, system)


def as_transformers_asks(template: str, messages: list[dict]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return "<s>" + texts[0].removeprefix("<s>")


@pytest.mark.parametrize(
    "template", [CHATML, KIND, LLAMA, GEMMA, PLAIN], ids=["chatml", "kind", "llama", "gemma", "plain"]
)
@pytest.mark.parametrize("talk", [TALK[:1], TALK, [SYSTEM, TALK[0]], [SYSTEM, *TALK]], ids=len)
def test_ollama_asks_as_the_chat_template_does(file, template, talk):
    said = parsed(modelfile({"gguf-q4_0": file(template)}))
    assert as_ollama_asks(said, talk) == as_transformers_asks(template, talk)


def test_chatml_is_said_in_the_form_of_ollamas_documentation(file):
    said = parsed(modelfile({"gguf-q4_0": file(CHATML)}))
    form = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    assert said["TEMPLATE"] == [form] and "SYSTEM" not in said


def test_default_system_message_of_the_template_is_kept(file):
    assert parsed(modelfile({"gguf-q4_0": file(KIND)}))["SYSTEM"] == ['Be "kind".']


@pytest.mark.parametrize(
    "template",
    [
        DATED,
        CHATML.replace("<|im_end|>", '"""'),
        CHATML.replace("<|im_end|>", "}}"),
        CHATML.replace("m['content']", "m['content'] | upper"),
        CHATML.replace("{% for", "{% if messages | length > 2 %}{{ 'again: ' }}{% endif %}{% for", 1),
        CHATML.replace(
            "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
        ),
        "{{ '<|im_start|>system\n<|im_end|>\n' if messages[0]['role'] != 'system' }}" + CHATML,
        "{{ messages[0]['content'] }}",
        "{% nonsense",
    ],
    ids=["date", "quotes", "braces", "capitals", "length", "no system", "empty system", "one turn", "broken"],
)
def test_a_template_that_cannot_be_said_or_proven_is_left_to_the_file(file, template):
    text = modelfile({"gguf-q4_0": file(template)})
    said = parsed(text)
    assert "TEMPLATE" not in said and "SYSTEM" not in said and "# No TEMPLATE" in text
    assert said["stop"] == ["</s>", "<|end|>"]


def test_a_model_without_a_chat_template_is_said_to_continue_text(file):
    text = modelfile({"gguf-q4_0": file()})
    assert "has no chat template" in text and "TEMPLATE" not in parsed(text)


def test_the_first_quantized_file_is_taken_and_the_others_are_named_to_change_to(file):
    files = {v: file(CHATML, v) for v in ("gguf-f16", "gguf-q8_0", "gguf-q4_0")}
    text = modelfile(files)
    assert text.startswith("FROM ./tiny-Q8_0.gguf\n# FROM ./tiny-F16.gguf\n# FROM ./tiny-Q4_0.gguf\n")
    assert parsed(text)["FROM"] == ["./tiny-Q8_0.gguf"]
    assert parsed(modelfile({"gguf-f16": files["gguf-f16"]}))["FROM"] == ["./tiny-F16.gguf"]


def test_stops_and_sampling_are_those_of_the_file(file):
    said = parsed(modelfile({"gguf-q4_0": file(CHATML, temp=0.6, top_k=20, penalty_repeat=1.05)}))
    assert said["stop"] == ["</s>", "<|end|>"]
    assert (said["temperature"], said["top_k"], said["repeat_penalty"]) == (["0.6"], ["20"], ["1.05"])
    assert "top_p" not in said and "min_p" not in said


def test_invalid_gguf_is_named(tmp_path, file):
    whole = file(CHATML)
    half = tmp_path / "half.gguf"
    half.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"half.gguf: only the beginning of a GGUF file"):
        read_dialogue(half)
    half.write_bytes(b"PK" * 100)
    with pytest.raises(CheckpointError, match=r"half.gguf: not a GGUF file"):
        read_dialogue(half)


def test_a_written_file_tells_its_template_stops_and_sampling(tiny_model, tmp_path):
    from pipeline.config.schema import VariantSpec
    from pipeline.models.matrices import linear_weights
    from pipeline.quantization.writer import quantize_checkpoint

    source = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), source)
    settings = '{"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [1, 2], "min_p": null}'
    (source / "generation_config.json").write_text(settings)
    spec = VariantSpec(name="gguf-bf16").resolved()
    quantize_checkpoint(source, [spec], {spec.name: tmp_path}, linear_weights(source), name="tiny")
    found = read_dialogue(tmp_path / "tiny-BF16.gguf")
    assert found.template and len(found.stops) >= 2
    assert {key: round(value, 6) for key, value in found.sampling.items()} == {
        "temp": 0.7,
        "top_k": 20,
        "penalty_repeat": 1.1,
    }
