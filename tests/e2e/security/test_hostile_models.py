"""Configurations, tokenizers, chat templates and pickles of models from anywhere: no code of theirs is run."""

from __future__ import annotations

import json
import shutil
import tomllib

import jinja2
import pytest
from packaging.requirements import Requirement

from pipeline.config.schema import Model
from tests.support import REPOSITORY
from tests.support.audit_watch import TOKEN
from tests.support.hostile import DEEP, ESCAPES, PICKLE


def own_copy(tiny_model, place):
    return shutil.copytree(tiny_model("llama"), place / "model")


# What a model's `config.json` may say beside what it says.
SETTINGS = {
    "code": ({"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}, "code of its own, which is never run"),
    "code and a type of no kind": ({"auto_map": {"AutoConfig": "own.Own"}, "model_type": ["llama"]}, "code of its own"),
    "a kernel": ({"attn_implementation": "somebody/kernel"}, "names code to fetch and run"),
    "a kernel, hidden": ({"_attn_implementation": "somebody/kernel:f"}, "names code to fetch and run"),
    "a kernel, deep inside": ({"text_config": {"x": [{"_attn_implementation": "a/b"}]}}, "names code to fetch and run"),
    "kernels by part": ({"attn_implementation": {"": "a/b"}}, "names code to fetch and run"),
    "a kernel for experts": ({"experts_implementation": "a/b"}, "names code to fetch and run"),
    "quantization": ({"quantization_config": {"quant_method": ESCAPES}}, "already quantized"),
    "quantization of no kind": ({"quantization_config": [1]}, "already quantized"),
    "architectures of no kind": ({"architectures": [{"a": 1}]}, "only decoders that generate text"),
    "a type of no kind": ({"model_type": ["llama"]}, "cannot read its configuration"),
    "no type": ({"model_type": None}, "cannot read its configuration"),
    "a way as type": ({"model_type": "../../x"}, "cannot read its configuration"),
    "text for a number": ({"hidden_size": ESCAPES}, "cannot read its configuration"),
    "nothing to divide by": ({"num_attention_heads": 0}, "cannot"),
    "fewer than no words": ({"vocab_size": -1}, "cannot"),
    "no such function": ({"hidden_act": "__import__('os')"}, "cannot build this model"),
    "no such numbers": ({"dtype": "float99"}, "cannot"),
    "positions of no kind": ({"rope_parameters": 7}, "cannot"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_model_configuration_is_refused(survives, place, tiny_model, name):
    from pipeline.models.matrices import linear_weights
    from pipeline.models.sources import check_source

    more, reason = SETTINGS[name]
    folder = own_copy(tiny_model, place)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | more))
    (folder / "own.py").write_text("open('owned', 'w')")

    def read():
        check_source(Model(source=str(folder)))
        linear_weights(folder)

    assert reason in survives(read) and not (place / "owned").exists()


TOKENIZERS = {
    "code": {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"},
    "code of another": {"auto_map": {"AutoTokenizer": "somebody/model--own.Own"}, "tokenizer_class": None},
    "code and a class of no kind": {"auto_map": {"AutoTokenizer": "own.Own"}, "tokenizer_class": ["Own"]},
    "a class of no kind": {"tokenizer_class": {"a": 1}},
    "special tokens of no kind": {"eos_token": 7, "additional_special_tokens": 9},
    "a length of no kind": {"model_max_length": "x", "padding_side": "up"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_settings_run_no_code(survives, place, tiny_model, name):
    from pipeline.inference.load import locate
    from pipeline.models.safe_loading import open_tokenizer

    folder = own_copy(tiny_model, place)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | TOKENIZERS[name]))
    (folder / "own.py").write_text("open('owned', 'w')")
    told = survives(lambda: open_tokenizer(folder))
    if "code" in name:
        assert "code of its own, which is never run" in told
        assert "code of its own, which is never run" in survives(lambda: locate(folder))
    assert not (place / "owned").exists()


@pytest.mark.parametrize("content", [b"", PICKLE, DEEP, b"{}", b'{"model": {"type": "x"}}', b"[]"], ids=range(6))
def test_damaged_tokenizer_is_refused(survives, place, tiny_model, content):
    from pipeline.models.safe_loading import open_tokenizer

    folder = own_copy(tiny_model, place)
    (folder / "tokenizer.json").write_bytes(content)
    assert "cannot read its tokenizer" in survives(lambda: open_tokenizer(folder))


def test_tokenizer_is_published_without_its_code(place, tiny_model):
    from pipeline.models.checkpoint_files import copy_companions

    folder = own_copy(tiny_model, place)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    asks = content | {
        "auto_map": {"AutoTokenizer": "somebody/x--own.Own"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(asks))
    (place / "release").mkdir()
    copy_companions(folder, place / "release")
    assert "auto_map" not in json.loads((place / "release" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_link_to_a_private_file_is_not_published(survives, place, tiny_model, name):
    from pipeline.models.checkpoint_files import copy_companions

    (place.parent / "private").write_text("not for you")
    folder = own_copy(tiny_model, place)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(place.parent / "private")
    (place / "release").mkdir()
    assert "a link to" in survives(lambda: copy_companions(folder, place / "release"))
    assert not (place / "release" / name).exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickled_weights_are_refused(survives, place, tiny_model, name):
    from pipeline.inference.load import load

    folder = own_copy(tiny_model, place)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / name).write_bytes(PICKLE)
    assert survives(lambda: load(folder)) and not (place / "owned").exists()


def test_training_refuses_pickled_weights(survives, place, tiny_model):
    from pipeline.errors import ModelError
    from pipeline.training.nf4_base import load_base

    folder = own_copy(tiny_model, place)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)

    def train():
        try:
            load_base(folder, in_nf4=False)
        except OSError as error:
            raise ModelError(str(error)) from None

    assert "model.safetensors" in survives(train) and not (place / "owned").exists()


def test_adapter_beside_a_model_does_not_lead_to_another(survives, place, tiny_model):
    from pipeline.inference.load import locate
    from pipeline.models.sources import check_source

    folder = own_copy(tiny_model, place)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}')
    for call in (lambda: locate(folder), lambda: check_source(Model(source=str(folder)))):
        assert "an adapter_config.json lies beside the model" in survives(call)


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ lipsum.__globals__['os'].popen('touch owned').read() }}", "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__.__base__ }}", "{{ raise_exception.__globals__ }}", "{{ (messages|attr('append'))({}) }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(messages) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% for", "{{ 1 / 0 }}", "{{ 'a' * 10 ** 14 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}", "{{ raise_exception('" + "x" * 100_000 + "') }}",
    f"{{{{ raise_exception('{TOKEN}') }}}}", "{{ messages[99].content }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ undefined.thing.of.things }}", ESCAPES,
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_chat_template_is_refused(survives, place, tiny_model, template):
    from pipeline.data.chat import ChatTemplate
    from pipeline.models.safe_loading import open_tokenizer
    from pipeline.publishing.ollama_template import find_turns

    tokenizer = open_tokenizer(tiny_model("llama"))
    tokenizer.chat_template = template

    def render():
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        used = ChatTemplate(tokenizer)
        used.answers(talk, used.render(talk))

    assert survives(render)
    survives(lambda: find_turns(template, {"bos_token": "<s>"}, ""))
    assert not (place / "owned").exists()


def test_versions_of_jinja_with_a_known_way_out_of_the_sandbox_are_not_installed():
    """CVE-2025-27516: in 3.1.5, a chat template reaches `format` through a filter, and anything through that."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (jinja,) = (found for one in project["dependencies"] if (found := Requirement(one)).name == "jinja2")
    assert not jinja.specifier.contains("3.1.5") and jinja.specifier.contains(jinja2.__version__)


def test_chat_shows_no_terminal_escapes(place, tiny_model, capfd, monkeypatch):
    """A model that writes the beginning of an escape sequence again and again."""
    import sys

    from safetensors.torch import load_file, save_file

    from pipeline.cli import main

    folder = own_copy(tiny_model, place)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].zero_()  # so that token 0 is always the likeliest
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    letters = tokenizer["model"]["vocab"]
    first, escape = next(letter for letter, number in letters.items() if number == 0), chr(0x11B)  # of byte 27
    letters[first], letters[escape] = letters[escape], 0
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    questions = iter(["Hello?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    monkeypatch.setattr(sys, "argv", ["tunepress", "chat", "./model", "--new-tokens", "3"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capfd.readouterr().out
    assert not ended.value.code and "\x1b" not in told and r"\x1b\x1b" in told, told
