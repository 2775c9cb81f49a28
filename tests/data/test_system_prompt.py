"""The system prompt that nobody asked for: found, said, and replaced."""

from __future__ import annotations

import json

import pytest

from pipeline.cli.wizard.summary import _lines
from pipeline.config.loader import load_config
from pipeline.data.encode import encode_examples
from pipeline.data.example import Example
from pipeline.data.system_prompt import added_prompt, prompt_in, set_prompt
from pipeline.data.template_options import options_of, set_options
from pipeline.errors import DataError, StageFailed
from pipeline.models.safe_loading import open_tokenizer
from pipeline.planning.plan import make_plan
from pipeline.planning.report import as_json
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.run import run_one
from tests.data.test_recipe_chat_templates import REAL, SMOLLM3
from tests.support.models import CHAT_TEMPLATE, write_model, write_tokenizer
from tests.support.runs import write_place

QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
OWN = 'You are Tina.\nSay "hello" \\o/ in {{ braces }}, and don\'t shout.'
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Ha"}]


def real(name: str) -> str:
    return (REAL / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def tokenizer_with(tmp_path):
    """`tokenizer_with(template)`: a tokenizer of single bytes with this chat template."""
    write_tokenizer(tmp_path)

    def make(template):
        tokenizer = open_tokenizer(tmp_path)
        tokenizer.chat_template = template
        return tokenizer

    return make


def rendered(tokenizer, *messages, template=None):
    return tokenizer.apply_chat_template([*messages], chat_template=template, tokenize=False)


@pytest.mark.parametrize(
    ("template", "added"),
    [
        (real("qwen2_5"), QWEN),
        (SMOLLM3, "Think first."),
        *((real(name), "") for name in ("qwen3", "llama3_2", "gemma", "gemma3", "phi3", "gptoss")),
        (CHAT_TEMPLATE, ""),
    ],
)
def test_the_prompt_that_a_template_adds_is_found(tokenizer_with, template, added):
    assert added_prompt(tokenizer_with(template)) == added == prompt_in(template)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2", "gemma3", "phi3", "qwen2_5_training"])
@pytest.mark.parametrize("prompt", [OWN, ""])
def test_a_set_prompt_is_that_of_conversations_without_one(tokenizer_with, name, prompt):
    tokenizer = tokenizer_with(real(name))
    set_prompt(tokenizer, prompt)
    if prompt or name.startswith("qwen2_5"):
        given = rendered(tokenizer, {"role": "system", "content": prompt}, *TALK, template=real(name))
        assert rendered(tokenizer, *TALK) == given
    else:
        assert tokenizer.chat_template == real(name)
    own = {"role": "system", "content": "Mine."}
    assert rendered(tokenizer, own, *TALK) == rendered(tokenizer, own, *TALK, template=real(name))


@pytest.mark.parametrize(("template", "prompt"), [(real("gemma"), OWN), (SMOLLM3, "")])
def test_a_template_that_does_not_take_the_prompt_is_refused(tokenizer_with, template, prompt):
    with pytest.raises(DataError, match="data.system .*: not possible with the chat template of"):
        set_prompt(tokenizer_with(template), prompt)


def test_a_set_prompt_is_read_and_not_learned(tokenizer_with):
    tokenizer = tokenizer_with(real("qwen2_5"))
    set_prompt(tokenizer, "Be brief.")
    (encoded,) = encode_examples([Example(tuple(TALK[:2]))], tokenizer, "auto", 500).examples
    assert "Be brief." in tokenizer.decode(encoded.input_ids)
    assert tokenizer.decode([label for label in encoded.labels if label >= 0]).startswith("Ho")


class Lines(Reporter):
    """A reporter that keeps what stages show."""

    def __init__(self):
        self.lines: list[str] = []

    def show(self, lines):
        self.lines += lines


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run on a model whose template adds a system prompt."""
    write_model(tmp_path / "model", "qwen3")
    (tmp_path / "model" / "chat_template.jinja").write_text(real("qwen2_5"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return write_place(tmp_path, tmp_path / "model", train={"method": "lora", "max_length": 256, "max_steps": 1})


def test_prompt_of_the_template_is_said_in_the_plan_and_before_training(place):
    config = load_config(str(place.config))
    said = f"48 of 48 examples have none, and the chat template gives them {QWEN!r}. It is trained in and published"
    assert any(said in note for note in as_json(make_plan(config))["notes"])
    assert "examples may have none" in str(as_json(make_plan(config, read_rows=False))["notes"])
    shown = Lines()
    run_one(config, "train", reporter=shown, start=run_stage_here)
    assert any(line.startswith(f"system    {said}") for line in shown.lines)
    assert place.results()["data"]["system_prompt"] == QWEN and place.results()["data"]["without_system"] == 48


def test_prompt_of_the_template_is_said_by_the_wizard(place):
    config = load_config(str(place.config))
    lines = dict(_lines(config, make_plan(config, read_rows=False)))
    assert f"the chat template gives them {QWEN!r}" in lines["System"]
    asked = load_config(str(place.config), ["data.system=Be brief."])
    assert "System" not in dict(_lines(asked, make_plan(asked)))


def test_prompt_of_the_configuration_is_that_of_the_published_model(place):
    config = load_config(str(place.config), ["data.system=Be brief."])
    assert "system prompt" not in str(as_json(make_plan(config))["notes"])
    for stage in ("train", "merge"):
        workspace = run_one(config, stage, start=run_stage_here)
    tokenizer = open_tokenizer(workspace.release)
    assert added_prompt(tokenizer) == "Be brief." == place.results()["data"]["system_prompt"]
    assert QWEN not in rendered(tokenizer, *TALK)


def test_prompt_for_plain_text_is_refused(place):
    place.folder.joinpath("rows.jsonl").write_text("".join(json.dumps({"text": f"Text {n}."}) + "\n" for n in range(9)))
    with pytest.raises(StageFailed, match="data.system: plain text has no system prompt"):
        run_one(load_config(str(place.config), ["data.system=Be brief."]), "train", start=run_stage_here)


def test_option_becomes_the_default_of_the_template_for_every_later_call(tokenizer_with):
    tokenizer = tokenizer_with(real("qwen3"))
    thinking = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    wanted = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert wanted != thinking
    template = set_options(tokenizer, {"enable_thinking": False})
    assert template.endswith(real("qwen3")) and tokenizer.chat_template == template
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == wanted
    given = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    assert tokenizer.apply_chat_template(TALK, **given) == thinking
    set_prompt(tokenizer, OWN)
    both = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert OWN in both and both.endswith("<think>\n\n</think>\n\n")
    example = Example(tuple(TALK[:2]))
    (encoded,) = encode_examples([example], tokenizer, "auto", 10_000).examples
    assert tokenizer.decode([label for label in encoded.labels if label >= 0]).startswith("Ho<|im_end|>")


def test_values_of_every_kind_arrive_as_they_are(tokenizer_with):
    values = {"a": True, "b": 3, "c": 0.5, "d": OWN + ' %s {% x %} "'}
    tokenizer = tokenizer_with("{{ [a, b, c] }}{{ d }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    set_options(tokenizer, values)
    assert rendered(tokenizer, *TALK) == f"{[True, 3, 0.5]}{values['d']}HiHoHa"


@pytest.mark.parametrize(
    ("template", "option", "said"),
    [
        (
            real("qwen3"),
            "enable_thinkin",
            "enable_thinkin: not an option of .*, for it reads enable_thinking. Try: remove",
        ),
        (real("qwen3"), "messages", "data.template_options.messages: not an option"),
        (real("qwen2_5"), "enable_thinking", "for it has no options. Try: remove it"),
        (CHAT_TEMPLATE, "add_generation_prompt", "for it has no options"),
        ("{% generation %}{{ mode }}{% endgeneration %}", "bos_token", "for it reads mode"),
        ("{% if %}", "mode", "for it has no options"),
    ],
)
def test_option_that_the_template_never_reads_is_refused_by_name(tokenizer_with, template, option, said):
    tokenizer = tokenizer_with(template)
    with pytest.raises(DataError, match=said):
        set_options(tokenizer, {option: False})
    assert tokenizer.chat_template == template and option not in options_of(template)
