"""The data set of the standard library's docstrings: the same on every machine, without repetition."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from pipeline.config.schema import Data
from pipeline.data import Example, load_examples
from pipeline.data.python_docs import python_docs, python_docs_pairs
from pipeline.errors import DataError
from tests.support import REPOSITORY

SOURCE = "builtin:python-docs"


@pytest.fixture(scope="module")
def data():
    return load_examples(Data(source=SOURCE))


def words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def module(example):
    return re.search(r"`(\w+)", example.messages[0]["content"]).group(1)


def test_there_are_thousands_of_examples_from_more_than_a_hundred_modules(data):
    examples = data.train + data.held_out
    assert data.form == "builtin" and data.rows == len(examples) > 2000 and data.duplicates == 0
    assert len({module(example) for example in examples}) > 100
    assert (data.license, data.language) == ("psf-2.0", "en")


def test_no_docstring_and_no_question_comes_twice(data):
    examples = data.train + data.held_out
    answers = Counter(words(example.messages[-1]["content"]) for example in examples)
    questions = Counter(example.messages[0]["content"] for example in examples)
    assert answers.most_common(1)[0][1] == 1 and questions.most_common(1)[0][1] == 1


def test_pairs_prefer_the_true_answer_to_another_or_to_half_of_it(data):
    pairs = python_docs_pairs()
    assert pairs == python_docs_pairs() and len(pairs) > 2000
    known = {e.canonical() for e in data.train + data.held_out}
    halves = 0
    for pair in pairs:
        better, worse = pair.messages[-1]["content"], pair.rejected["content"]
        assert Example(pair.messages).canonical() in known and worse.strip() and better != worse
        halves += better.startswith(worse)
    assert 0.25 < halves / len(pairs) < 0.4
    found = load_examples(Data(source=f"{SOURCE}-pairs", limit=400))
    assert (found.form, found.rows, len(found.held_out)) == ("preference", len(pairs), 20)


def test_training_and_held_out_share_no_prompt_and_no_answer(data):
    for text in (lambda e: e.prompt(), lambda e: words(e.messages[-1]["content"])):
        assert not {text(e) for e in data.train} & {text(e) for e in data.held_out}
    assert len(data.held_out) == round(0.05 * data.rows)


def test_answers_are_prose_of_a_reasonable_length(data):
    for example in data.train:
        answer = example.messages[-1]["content"]
        assert 40 <= len(answer) <= 1500 and answer == answer.strip() and not answer.startswith(">>>")


def test_nothing_private_and_no_tests_are_asked_about(data):
    for example in data.train + data.held_out:
        name = re.search(r"`([\w.]+)", example.messages[0]["content"]).group(1)
        assert not any(part.startswith("_") for part in name.split("."))
        assert module(example) not in {"test", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}


def test_two_fresh_processes_build_the_same_set(data):
    script = (
        "from pipeline.config.schema import Data; from pipeline.data import load_examples; import sys\n"
        f"print(load_examples(Data(source={SOURCE!r})).fingerprint, 'pydoc_data.topics' in sys.modules)"
    )
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert result.stdout.split() == [data.fingerprint, "False"]


def test_a_limit_samples_all_over_the_library(data, monkeypatch):
    monkeypatch.setattr("pipeline.data.python_docs.python_docs", lambda: [*data.train, *data.held_out])
    few = load_examples(Data(source=SOURCE, limit=200))
    examples = few.train + few.held_out
    assert len(examples) == 200 and few.rows == data.rows
    assert len({module(example) for example in examples}) > 40
    assert {example.canonical() for example in examples} <= {e.canonical() for e in data.train + data.held_out}
    other = load_examples(Data(source=SOURCE, limit=200, seed=1))
    assert other.fingerprint != few.fingerprint


@pytest.fixture
def library(tmp_path):
    """A folder with a few modules as they could be in a standard library."""

    def build(**files):
        for name, text in files.items():
            path = tmp_path / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return [(e.messages[0]["content"], e.messages[1]["content"]) for e in python_docs(tmp_path)]

    return build


DOC = "Return what was asked for, or raise an error if that cannot be."


def test_questions_show_the_call_as_a_caller_writes_it(library):
    pairs = library(
        textwrap=f"class Box:\n"
        f'    def fill(self, a, b=1, *, c):\n        """{DOC}"""\n'
        f'    @staticmethod\n    def of(a, /, b):\n        """{DOC} Static."""\n'
        f'    @property\n    def size(self):\n        """{DOC} Property."""\n'
        f'async def wait({", ".join(f"argument_{i}" for i in range(20))}):\n    """{DOC} Async."""\n'
    )
    calls = [re.search("`(.*)`", question).group(1) for question, _ in pairs]
    assert calls == [
        "textwrap.Box.fill(a, b=1, *, c)",
        "textwrap.Box.of(a, /, b)",
        "textwrap.Box.size",
        "textwrap.wait",
    ]
    assert pairs[0][1] == DOC


def test_a_docstring_under_two_names_comes_once_whatever_its_layout(library):
    indented = DOC.upper().replace(", ", ",\n        ")
    assert len(library(abc=f'"""{DOC}"""\ndef f():\n    """{indented}"""', cmd=f'"""{DOC}"""')) == 1


def test_docstrings_that_say_nothing_are_left_out(library):
    docs = ["Short.", "https://example.org/" + "a/" * 30, "f(first_argument, second_argument, third_argument) -> int"]
    docs += [">>> one_call(with_many, arguments_of, all_kinds, and_more)", "word " * 400, DOC]
    pairs = library(abc="\n".join(f'def f{i}():\n    """{doc}"""' for i, doc in enumerate(docs)))
    assert [answer for _, answer in pairs] == [DOC]


def test_private_broken_and_foreign_files_are_left_out(library):
    good = f'"""{DOC} %s"""\ndef _private():\n    """{DOC} Private."""'
    pairs = library(
        abc=good % "Public.",
        _abc=good % "Private module.",
        sitecustomize=good % "Of this machine.",
        json__in____init__=good % "Package.",
        json__in____main__=good % "Command.",
        json__in__tests=good % "Tests.",
        cmd="def broken(:",
    )
    assert [answer for _, answer in pairs] == [f"{DOC} Public.", f"{DOC} Package."]


def test_a_python_without_its_sources_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no sources of the standard library"):
        python_docs(tmp_path)
