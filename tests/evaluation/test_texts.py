"""The measured texts: prompts and documents are clusters, and each gives something before any gives more."""

from __future__ import annotations

import json
import random

import pytest

from pipeline.config.schema import Config
from pipeline.data import Example, general_documents, general_text, write_examples
from pipeline.data.encode import SHORTEST_WINDOW, encode_text
from pipeline.errors import DataError
from pipeline.evaluation import texts
from pipeline.evaluation.texts import RunTexts
from pipeline.models.safe_loading import open_tokenizer
from tests.support.texts import general_text as several_documents

TOPICS = "builtin:python-topics"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return open_tokenizer(tiny_model("llama"))


def config_for(general: object = TOPICS, max_tokens: int = 512, data: dict | None = None, **train) -> Config:
    tree = {"name": "m", "model": {"source": "user/model"}, "data": data, "train": train}
    return Config.model_validate(tree | {"evaluate": {"general": str(general), "max_tokens": max_tokens}})


def clusters(sequences) -> list[int]:
    return [sequence.cluster for sequence in sequences]


@pytest.mark.parametrize("max_tokens", [512, 4096])
def test_general_text_is_a_window_of_each_topic(tokenizer, max_tokens):
    windows = texts.general(config_for(max_tokens=max_tokens), tokenizer, None)
    assert sum(len(window.input_ids) for window in windows) == max_tokens
    assert clusters(windows) == list(range(len(windows))) and len(windows) >= texts.WINDOWS
    topics = general_documents(TOPICS)
    for window in windows:
        assert topics[window.cluster].startswith(tokenizer.decode(window.input_ids, skip_special_tokens=True)[:20])


def test_second_windows_follow_when_every_document_has_given_one(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight. " * 30 + "\n\n\n" + "nine ten. " * 12)
    windows = texts.general(config_for(tmp_path / "a.txt", 1024), tokenizer, None)
    assert clusters(windows)[:4] == [0, 1, 0, 1] and set(clusters(windows)[4:]) == {0}


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n\n\ntwo\n \n\t\nthree\n", 3),
        ("one\n\nstill one\nand still\n", 1),
        ("one\ftwo", 2),
        (" \n = First = \n \n text \n = = Part = = \n more \n = Second = \n text", 2),
        ("\n\n\n\none\n\n\n\n\n", 1),
    ],
)
def test_file_is_cut_into_documents(tmp_path, text, documents):
    (tmp_path / "a.txt").write_text(text)
    found = general_documents(str(tmp_path / "a.txt"))
    assert len(found) == documents and "".join("".join(found).split()) == "".join(text.split())


def test_text_to_choose_settings_on_is_never_measured(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(several_documents(40))
    config = config_for(tmp_path / "a.txt", 512)
    measured, other = texts.general(config, tokenizer, None), texts.general_unmeasured(config, tokenizer, None, 256)
    assert len(other) >= 2 and sum(len(window.input_ids) for window in other) <= 256
    assert not set(clusters(measured)) & set(clusters(other))
    assert not {tuple(w.input_ids) for w in measured} & {tuple(w.input_ids) for w in other}
    (tmp_path / "a.txt").write_text(several_documents(8))
    with pytest.raises(DataError, match="no text beyond the measured one to choose layers on. Try: a longer text"):
        texts.general_unmeasured(config_for(tmp_path / "a.txt", 4096), tokenizer, None, 256)


def test_earlier_versions_measured_one_running_text(tokenizer):
    windows = texts.general(config_for(), tokenizer, None, by_cluster=False)
    assert windows == encode_text(general_text(TOPICS), tokenizer, SHORTEST_WINDOW, 512)
    assert set(clusters(windows)) == {0}


def held_out(tokenizer, folder, examples, max_tokens: int, by_cluster: bool = True, **train):
    (folder / "rows.jsonl").write_text(json.dumps({"text": "unused"}) + "\n")
    write_examples(folder / "held_out.jsonl", examples)
    config = config_for(max_tokens=max_tokens, data={"source": str(folder / "rows.jsonl")}, **train)
    return texts.held_out(config, RunTexts(folder / "held_out.jsonl", folder), tokenizer, by_cluster)


def test_windows_of_a_text_are_one_cluster_and_every_text_gives_its_first_one_first(tokenizer, tmp_path):
    draw = random.Random(0)
    examples = [Example(text=" ".join(draw.choices(("red", "green", "blue"), k=300))) for _ in range(6)]
    found = held_out(tokenizer, tmp_path, examples, 1024, max_length=64)
    assert clusters(found) == [n % 6 for n in range(len(found))] and len(found) > 12
    before = held_out(tokenizer, tmp_path, examples, 1024, by_cluster=False, max_length=64)
    assert set(clusters(before)) == {0} and before[1].input_ids != found[1].input_ids


def test_answers_to_one_prompt_are_one_cluster(tokenizer, tmp_path):
    def answer(question: str, reply: str) -> Example:
        return Example(({"role": "user", "content": question}, {"role": "assistant", "content": reply}))

    examples = [answer(f"What is {n // 3}?", f"It is {n}.") for n in range(12)]
    found = held_out(tokenizer, tmp_path, examples, 100_000, max_length=128)
    assert clusters(found) == [0, 1, 2, 3] * 3
