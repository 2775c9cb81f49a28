"""Chat with GGUF variants: in llama.cpp, with a hint for users of transformers."""

import shutil

import pytest
from rich.console import Console

from pipeline.cli import chat
from pipeline.errors import ModelError
from pipeline.inference.load import load, locate_file
from pipeline.system import hardware


@pytest.fixture
def release(tiny_model, written, tmp_path):
    """The folder of a release with a GGUF and nothing else."""
    (tmp_path / "release" / "gguf").mkdir(parents=True)
    shutil.copy(written(tiny_model("llama"), "gguf-q4_0"), tmp_path / "release" / "gguf" / "my-model-Q4_0.gguf")
    return tmp_path / "release"


def test_gguf_chat_does_not_use_transformers(release):
    with pytest.raises(ModelError, match=r"llama-cli -m .*release/gguf/my-model-Q4_0\.gguf$") as caught:
        load(release, "gguf-q4_0")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("gguf-q4_0: is for llama.cpp")
    with pytest.raises(ModelError, match=r"Llama\.from_pretrained\('user/model', filename='gguf/\*-Q4_0\.gguf'\)"):
        load("user/model", "GGUF-Q4_0")


def test_missing_gguf_file_is_named_with_the_existing_ones(release):
    assert locate_file(release, "gguf-q4_0").name == "my-model-Q4_0.gguf"
    (release.parent / "config.yaml").touch()
    assert locate_file(release.parent, "gguf-q4_0").parent == release / "gguf"  # a run's folder stands for it
    with pytest.raises(ModelError, match=r"no gguf/\*-Q8_0\.gguf; files for llama.cpp there: my-model-Q4_0\.gguf"):
        load(release, "gguf-q8_0")
    with pytest.raises(ModelError, match="variant 'gguf-q3': not one that tunepress makes"):
        load(release, "gguf-q3")


@pytest.fixture
def talk(monkeypatch):
    """`talk(source, *questions)`: a talk on the terminal."""
    monkeypatch.setattr(hardware, "cores", lambda: 1)

    def run(source, *questions, device="auto"):
        asked = iter(questions)
        monkeypatch.setattr("builtins.input", lambda _: next(asked, ""))
        chat.chat(str(source), "gguf-q4_0", device, 8, Console(soft_wrap=True))

    return run


def test_llama_cpp_answers_question_after_question(release, talk, capfd):
    pytest.importorskip("llama_cpp")
    talk(release, "Hello?")
    once = capfd.readouterr()
    assert "gguf-q4_0 on cpu in llama.cpp" in once.out and once.err == ""
    first, *rest = once.out.split("\n", 1)
    assert rest[0].strip()
    talk(release, "Hello?", "And then?")
    assert len(capfd.readouterr().out) > len(once.out)


def test_a_talk_that_is_too_long_ends_in_one_line(release, talk, monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(chat, "CONTEXT", 32)
    with pytest.raises(ModelError, match="my-model-Q4_0.gguf: .*context") as caught:
        talk(release, "Hello? " * 60)
    assert "\n" not in str(caught.value)


def test_a_talk_is_no_longer_than_the_model_was_made_for(tiny_model, written, release, talk):
    pytest.importorskip("llama_cpp")
    short = written(tiny_model("llama", max_position_embeddings=256), "gguf-q4_0")
    shutil.copy(short, release / "gguf" / "my-model-Q4_0.gguf")
    with pytest.raises(ModelError, match="context window of 256"):
        talk(release, "Hello? " * 60)


def test_llama_cpp_takes_no_device(release, talk):
    with pytest.raises(ModelError, match="leave out --device"):
        talk(release, device="cuda")


def test_a_file_without_a_chat_template_cannot_be_talked_to(release, talk):
    pytest.importorskip("llama_cpp")
    file = release / "gguf" / "my-model-Q4_0.gguf"
    file.write_bytes(file.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_xxxxxxxx"))
    with pytest.raises(ModelError, match="no chat template, so the model cannot chat"):
        talk(release, "Hello?")
