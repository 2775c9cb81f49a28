"""Sources and splits: found or refused, and the same split on every machine."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.schema import Data
from pipeline.data import Example, check_source, general_text, load_examples, read_examples, write_examples
from pipeline.data.splitting import split
from pipeline.errors import DataError
from tests.support import REPOSITORY

# Of 100 pairs with 5 % held out, so that a published model can be compared with one of a later version.
FORMER_SPLIT = ("1dcbb76229c8a3bd01af58e34a37554527cb482191a03a9bdd4f0f5ab4e4e0dd", "08c8c10a05c08cd6")


def write(path, pairs):
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def pairs():
    return [(f"question {i}", f"answer {i}") for i in range(100)]


def contents(examples):
    return {example.canonical() for example in examples}


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path, pairs):
    ordered = load_examples(Data(source=write(tmp_path / "a.jsonl", pairs), held_out=0.2))
    random.Random(1).shuffle(pairs)
    shuffled = load_examples(Data(source=write(tmp_path / "b.jsonl", pairs), held_out=0.2))
    assert (ordered.train, ordered.held_out) == (shuffled.train, shuffled.held_out)
    assert ordered.fingerprint == shuffled.fingerprint


def test_the_split_has_the_share_that_was_asked_for_and_loses_nothing(tmp_path, pairs):
    data = load_examples(Data(source=write(tmp_path / "a.jsonl", pairs), held_out=0.2))
    assert (len(data.train), len(data.held_out), data.rows, data.duplicates) == (80, 20, 100, 0)
    assert len(contents(data.train) | contents(data.held_out)) == 100
    assert data.license is None and data.language is None


def test_another_seed_is_another_split(tmp_path, pairs):
    source = write(tmp_path / "a.jsonl", pairs)
    first, second = (load_examples(Data(source=source, seed=seed, held_out=0.2)) for seed in (0, 1))
    assert contents(first.held_out) != contents(second.held_out)
    assert first.fingerprint != second.fingerprint


def test_duplicates_are_dropped_and_counted(tmp_path, pairs):
    once = load_examples(Data(source=write(tmp_path / "a.jsonl", pairs)))
    twice = load_examples(Data(source=write(tmp_path / "b.jsonl", pairs + pairs[:30])))
    assert (twice.rows, twice.duplicates) == (130, 30)
    assert twice.fingerprint == once.fingerprint


def test_all_answers_to_one_prompt_are_on_one_side(tmp_path):
    pairs = [(f"question {i % 20}", f"answer {i}") for i in range(100)]
    for seed in range(5):
        data = load_examples(Data(source=write(tmp_path / "a.jsonl", pairs), held_out=0.3, seed=seed))
        assert not {e.prompt() for e in data.train} & {e.prompt() for e in data.held_out}
        assert len(data.held_out) == 30


def turns(*texts, system=None):
    """The conversation of these texts: a question, its answer, and so on."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def load_messages(tmp_path, rows, loss_on="auto", **options):
    path = tmp_path / "messages.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    return load_examples(Data(source=str(path), **options), loss_on)


def learned(examples, loss_on="auto"):
    """Every learned answer with all messages before it."""
    ends = ([i for i, m in enumerate(e.messages, start=1) if m["role"] == "assistant"] for e in examples)
    ends = (found[-1:] if loss_on == "completion" else found for found in ends)
    return {str(e.messages[:end]) for e, found in zip(examples, ends, strict=True) for end in found}


@pytest.fixture
def row_per_turn():
    """Thirty conversations of four turns with a row for each turn, as exporters of chats write them."""
    talks = [[f"{word} {n}.{i}" for i in range(4) for word in ("question", "answer")] for n in range(30)]
    return [turns(*talk[:end]) for talk in talks for end in (2, 4, 6, 8)]


def test_no_answer_is_held_out_that_a_longer_row_of_the_conversation_learns(tmp_path, row_per_turn):
    for seed in range(5):
        data = load_messages(tmp_path, row_per_turn, held_out=0.2, seed=seed)
        assert len(data.held_out) == 24
        assert not learned(data.train) & learned(data.held_out)
        assert not {e.prompt() for e in data.train} & {e.prompt() for e in data.held_out}


def test_rows_of_a_conversation_may_be_apart_if_only_last_answers_are_learned(tmp_path, row_per_turn):
    data = load_messages(tmp_path, row_per_turn, "completion", held_out=0.2)
    assert not learned(data.train, "completion") & learned(data.held_out, "completion")
    assert {e.prompt() for e in data.train} & {e.prompt() for e in data.held_out}


def test_conversations_are_told_apart_by_all_messages_before_the_answer(tmp_path):
    systems = load_messages(tmp_path, [turns("q", "a", system="short"), turns("q", "a", system="long")])
    assert (len(systems.train), len(systems.held_out)) == (1, 1)
    earlier = load_messages(tmp_path, [turns("x", "a", "q", "b"), turns("y", "a", "q", "b")], "completion")
    assert (len(earlier.train), len(earlier.held_out)) == (1, 1)


def test_rows_that_learn_different_answers_of_a_conversation_share_a_side():
    rows = []
    for n in range(20):  # the second row learns an answer in a context that the first one learns an answer in, too
        talk = turns(f"q{n}", "a", f"r{n}", "b")
        rows += [talk, [talk[0], {**talk[1], "weight": 0}, *turns(f"r{n}", "c")]]
    examples = [Example(tuple(row)) for row in rows]
    for seed in range(3):
        sides = split(examples, Data(source="any", held_out=0.2, seed=seed))[:2]
        asked = [{e.messages[0]["content"] for e in side} for side in sides]
        assert len(sides[1]) == 8 and not asked[0] & asked[1]


def test_one_greeting_in_front_of_all_conversations_does_not_make_them_one(tmp_path):
    rows = [[{"role": "assistant", "content": "Hello!"}, *turns(f"q{i}", f"a{i}")] for i in range(10)]
    data = load_messages(tmp_path, rows, held_out=0.2)
    assert (len(data.train), len(data.held_out)) == (8, 2)


def test_conversations_that_all_begin_with_the_same_learned_answer_are_refused(tmp_path):
    rows = [turns("example?", "like this", f"q{i}", f"a{i}") for i in range(10)]
    with pytest.raises(DataError, match="the same question, .* Try: --set train.loss_on=completion"):
        load_messages(tmp_path, rows)
    assert len(load_messages(tmp_path, rows, "completion", held_out=0.2).held_out) == 2


def test_the_split_of_single_answers_is_that_of_earlier_versions(tmp_path, pairs):
    data = load_examples(Data(source=write(tmp_path / "a.jsonl", pairs), held_out=0.05))
    assert (data.fingerprint, data.trained_from) == FORMER_SPLIT


def test_a_prompt_with_more_answers_than_the_share_still_leaves_something_to_hold_out(tmp_path):
    data = load_examples(Data(source=write(tmp_path / "a.jsonl", [(f"q{i % 2}", f"a{i}") for i in range(10)])))
    assert (len(data.train), len(data.held_out)) == (5, 5)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.89])
def test_two_examples_split_one_and_one(tmp_path, share):
    data = load_examples(Data(source=write(tmp_path / "a.jsonl", [("p", "c"), ("q", "d")]), held_out=share))
    assert (len(data.train), len(data.held_out)) == (1, 1)


@pytest.mark.parametrize("pairs", [[("p", "c")], [("p", "c")] * 5, [("p", "c"), ("p", "d")]])
def test_a_set_too_small_to_split_is_refused(tmp_path, pairs):
    with pytest.raises(DataError, match="too small to hold something out"):
        load_examples(Data(source=write(tmp_path / "a.jsonl", pairs)))


def test_the_limit_counts_different_examples_and_takes_the_same_ones_in_any_order(tmp_path, pairs):
    forwards = load_examples(Data(source=write(tmp_path / "a.jsonl", pairs * 2), limit=40))
    backwards = load_examples(Data(source=write(tmp_path / "b.jsonl", pairs[::-1]), limit=40))
    assert len(forwards.train) + len(forwards.held_out) == 40
    assert forwards.fingerprint == backwards.fingerprint
    assert forwards.rows == 200 and forwards.duplicates == 100


def test_examples_survive_a_file(tmp_path):
    content = 'Ümlaut, "quotes",\nlines\u2028and\u0085others \0 \N{PILE OF POO}'
    examples = (Example(({"role": "user", "content": content}, {"role": "assistant", "content": " a "})),) * 2
    write_examples(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl") == examples
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_pairs_survive_a_file(tmp_path):
    asked = (
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "weight": 0},
        {"role": "user", "content": "R"},
    )
    tools = ({"type": "function", "function": {"name": "f"}},)
    better, worse = ({"role": "assistant", "content": answer} for answer in "BC")
    examples = (Example((*asked, better), tools=tools, rejected=worse), Example((asked[2], better), rejected=worse))
    write_examples(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl") == examples


def test_texts_survive_a_file(tmp_path):
    examples = (Example(text='{"messages": []}\n'), Example(text=" \u2028 text "))
    write_examples(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl") == examples


def test_texts_are_split_like_conversations(tmp_path):
    rows = [json.dumps({"text": f"text {i % 50}"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    data = load_examples(Data(source=str(tmp_path / "a.jsonl"), held_out=0.2))
    assert (data.form, data.rows, data.duplicates, len(data.train), len(data.held_out)) == ("text", 60, 10, 40, 10)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("old")

    def examples():
        yield Example(({"role": "assistant", "content": "a"},))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(path, examples())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("./nothing.jsonl", "no such file"),
        ("~/nothing-of-that-name", "no such file"),
        ("user/nothing.parquet", "no such file"),
        ("nothing", "neither a file nor a data set on the Hub"),
        ("a/b/c", "neither a file nor a data set on the Hub"),
        ("user/two--dashes", "neither a file nor a data set on the Hub"),
        ("x" * 5000 + "/y", "neither a file"),
        ("folder", "is a folder; name one file in it, or join its files into one"),
        ("builtin:nothing", "there is builtin:python-docs"),
        ("table.xls", ".xls is not read here; supported are .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet"),
    ],
)
def test_a_source_that_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch, source, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.xls").write_text("a,b")
    for refuse in (check_source, load_examples):
        with pytest.raises(DataError) as caught:
            refuse(Data(source=source))
        assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("cold")
def test_good_sources_pass_the_check_without_network_torch_or_datasets(tmp_path, pairs):
    source = write(tmp_path / "a.jsonl", pairs)
    (tmp_path / "a.csv").write_text("prompt,completion\np,c\n")
    table = str(tmp_path / "a.csv")
    script = (
        "import sys; from pipeline.config.schema import Data; from pipeline.data import check_source, load_examples\n"
        "import pipeline.data.describe, pipeline.data.hub\n"
        f"sources = ('builtin:python-docs', 'user/data-set', {source!r}, {table!r})\n"
        "for source in sources: check_source(Data(source=source))\n"
        f"load_examples(Data(source={source!r}))\n"
        "print({'torch', 'datasets', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "set()"


def test_general_text_is_the_long_topics_each_once():
    text = general_text("builtin:python-topics")
    assert text == general_text("builtin:python-topics") and len(text) > 200_000
    paragraphs = [p for p in text.split("\n\n") if len(p) > 300]
    assert len(paragraphs) > 100 and len(set(paragraphs)) == len(paragraphs)


def test_general_text_can_be_a_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfSome t\xc3\xa9xt.")
    assert general_text(str(tmp_path / "a.txt")) == "Some téxt."


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "latin.txt", "page.html", "builtin:novels", "null\0.txt"])
def test_missing_general_text_gives_one_line(tmp_path, name):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as caught:
        general_text(name if name.startswith("builtin") else str(tmp_path / name))
    assert name.replace("\0", "\\x00") in str(caught.value) and "\n" not in str(caught.value)


def rows_of(path, questions, answer="A"):
    return write(path, [(question, f"{answer} {question}") for question in questions])


def asked(examples):
    return [example.messages[0]["content"] for example in examples]


def test_sources_are_split_together_and_used_as_often_as_their_weights_say(tmp_path):
    names = {"half": 0.5, "once": 1, "twice": 2, "more": 1.25}
    paths = {name: rows_of(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(40)]) for name in names}
    sources = [{"source": paths[name], "weight": weight} for name, weight in names.items()]
    data = load_examples(Data(sources=sources, held_out=0.25))
    assert (data.rows, data.duplicates, len(data.held_out)) == (160, 0, 40)
    assert max(Counter(asked(data.held_out)).values()) == 1 and not set(asked(data.train)) & set(asked(data.held_out))
    for name, weight in names.items():
        known = sum(question.startswith(name) for question in asked(data.held_out))
        used = Counter(question for question in asked(data.train) if question.startswith(name))
        assert sum(used.values()) == round((40 - known) * weight) and set(used.values()) <= {
            int(weight),
            -int(-weight // 1),
        }
    again = load_examples(Data(sources=sources, held_out=0.25))
    assert again.train == data.train and again.fingerprint == data.fingerprint
    plain = [{"source": paths[name]} for name in names]
    assert load_examples(Data(sources=plain, held_out=0.25)).held_out == data.held_out
    assert load_examples(Data(sources=plain, held_out=0.25)).fingerprint != data.fingerprint


def test_prompt_that_two_sources_have_is_on_one_side_and_a_limit_is_that_of_its_source(tmp_path):
    questions = [f"Q{i}" for i in range(60)]
    first = {"source": rows_of(tmp_path / "a.jsonl", questions, "A"), "limit": 30}
    second = {"source": rows_of(tmp_path / "b.jsonl", questions, "B")}
    data = load_examples(Data(sources=[first, second], held_out=0.3))
    assert len(data.train) + len(data.held_out) == 90 and not set(asked(data.train)) & set(asked(data.held_out))
    assert [(Path(part.source).name, part.rows) for part in data.parts] == [("a.jsonl", 60), ("b.jsonl", 60)]
    assert data.source == f"{first['source']}, {second['source']}" and data.form == "prompt_completion"


def test_one_entry_of_sources_is_the_same_data_as_a_single_source(tmp_path):
    path = rows_of(tmp_path / "a.jsonl", [f"Q{i}" for i in range(30)])
    one, other = load_examples(Data(source=path)), load_examples(Data(sources=[{"source": path}]))
    assert (one.fingerprint, one.train, one.held_out) == (other.fingerprint, other.train, other.held_out)


def test_held_out_examples_of_their_own_leave_their_prompts_out_of_training(tmp_path):
    train = rows_of(tmp_path / "a.jsonl", [f"Q{i}" for i in range(30)])
    held_out = rows_of(tmp_path / "b.jsonl", [f"Q{i}" for i in range(25, 35)], "B")
    data = load_examples(Data(source=train, validation={"source": held_out, "limit": 8}))
    assert len(data.held_out) == 8 and all(e.messages[1]["content"].startswith("B") for e in data.held_out)
    assert set(asked(data.train)) == {f"Q{i}" for i in range(30)} - set(asked(data.held_out))
    assert data.kept_out == 30 - len(data.train) > 0
    with pytest.raises(DataError, match="every prompt is in .*b.jsonl too. Try: another data.validation"):
        load_examples(Data(source=rows_of(tmp_path / "c.jsonl", ["Q26"]), validation={"source": held_out}))


def test_texts_conversations_and_pairs_are_not_mixed(tmp_path):
    rows = rows_of(tmp_path / "a.jsonl", ["Q", "R"])
    (tmp_path / "b.jsonl").write_text('{"text": "T"}')
    (tmp_path / "c.jsonl").write_text('{"prompt": "Q", "chosen": "A", "rejected": "B"}')
    for name, kind in (("b.jsonl", "plain text"), ("c.jsonl", "pairs of answers")):
        other = str(tmp_path / name)
        with pytest.raises(DataError, match=f"{name} has {kind}"):
            load_examples(Data(sources=[{"source": rows}, {"source": other}]))
        with pytest.raises(DataError, match="they cannot be used together. Try: sources of one kind"):
            load_examples(Data(source=rows, validation={"source": other}))


def test_bad_rows_of_several_sources_are_named_with_their_source(tmp_path):
    good = rows_of(tmp_path / "a.jsonl", [f"Q{i}" for i in range(9)])
    bad = rows_of(tmp_path / "b.jsonl", [f"R{i}" for i in range(9)])
    with open(bad, "a") as file:
        file.write('\n{"prompt": "Q"}\n')
    told = []
    both = Data(sources=[{"source": good}, {"source": bad}], on_bad_row="skip")
    data = load_examples(both, on_skip=lambda where, reason: told.append(where))
    assert told == [f"{bad}, line 10"] and data.skipped.total == 1
    with pytest.raises(DataError, match="b.jsonl, line 10"):
        check_source(both.model_copy(update={"on_bad_row": "refuse"}))
