"""The description of a data set: true counts, and no text of its rows."""

from __future__ import annotations

import json

import pytest

from pipeline.config.schema import Data
from pipeline.data import DataSet, Example, load_examples
from pipeline.data.describe import describe, report, samples
from pipeline.data.encode import Encoded, EncodedSet, encode_examples
from pipeline.data.overlap import Overlap, overlap
from pipeline.data.supplied_template import supply_template

transformers = pytest.importorskip("transformers")

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tests.support.models import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def told(tmp_path, tokenizer):
    """`told(rows)`: the description of these rows and the lines of its report."""

    def tell(rows, max_length=200, tokenizer=tokenizer, loss_on="auto", **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        data = load_examples(Data(source=str(path), **options), loss_on)
        splits = {"training": data.train, "held-out": data.held_out}
        encoded = {name: encode_examples(part, tokenizer, loss_on, max_length) for name, part in splits.items()}
        description = describe(data, encoded, tokenizer)
        assert json.loads(json.dumps(description)) == description
        return description, report(description, samples(data, encoded, tokenizer))

    return tell


def pairs(count):
    return [{"prompt": f"Ask {i}", "completion": f"Say {i}"} for i in range(count)]


def test_description_counts_rows_and_examples(told):
    rows = [*pairs(20), *pairs(3), "{", {"prompt": "long", "completion": "x" * 500}]
    rows += [{"prompt": "y" * 500, "completion": "lost"}]
    description, _ = told([*({**row, "id": 1} if isinstance(row, dict) else row for row in rows)], on_bad_row="skip")
    assert (description["form"], description["rows"], description["duplicates"]) == ("prompt_completion", 26, 3)
    assert (description["skipped"], description["unused_columns"]) == (1, ["id"])
    assert description["template"] == "the model's own" and description["revision"] is None
    splits = description["splits"].values()
    assert sum(part["examples"] for part in splits) == 21
    assert (sum(part["truncated"] for part in splits), sum(part["dropped"] for part in splits)) == (1, 1)
    training = description["splits"]["training"]
    lengths = training["lengths"]
    assert 30 < lengths["min"] <= lengths["median"] <= lengths["p95"] <= lengths["max"] <= 200
    assert 0 < training["loss_tokens"] < training["tokens"] < 200 * training["sequences"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (4, 4, 4, 4)), (2, (4, 4, 5, 5)), (20, (4, 13, 22, 23)), (100, (4, 53, 98, 103))],
)
def test_reported_lengths_are_those_of_real_examples(count, expected):
    part = EncodedSet([Encoded([0] * (i + 4), []) for i in range(count)], 0, 0, 0, 0)
    data = DataSet("rows.jsonl", "text", (), (), 0, 0, "")
    lengths = describe(data, {"training": part}, tokenizer=None)["splits"]["training"]["lengths"]
    assert tuple(lengths[name] for name in ("min", "median", "p95", "max")) == expected


def test_overlap_with_held_out_examples_is_counted(told):
    same = [{"prompt": f"Ask {i}", "completion": " ".join(WORDS)} for i in range(20)]
    description, lines = told(same, held_out=0.2)
    counts = {"compared": 4, "same": 4, "near": 4, "answers": 4, "trained": 0}
    assert description["overlap"] == {**counts, "run_of_words": 8, "near_from": 0.5}
    assert description["split_by"] == "first learned answer"
    assert any(
        line.startswith("overlap   of 4 held-out examples, 4 have answers that training has too") for line in lines
    )
    _, lines = told(pairs(20))
    assert "overlap   none of the answers of 1 held-out example(s) found in training" in lines


def test_no_text_of_a_row_is_in_the_description(told):
    rows = [{"prompt": f"secret {i}", "completion": f"secret {i}", "id": i} for i in range(20)] + ['{"secret']
    description, lines = told(rows, on_bad_row="skip")
    assert "secret" not in json.dumps({key: value for key, value in description.items() if key != "source"})
    assert any("secret" in line for line in lines)


def test_the_report_shows_three_examples_with_what_is_learned_marked(told):
    _, lines = told([{"prompt": f"Ask {i}", "completion": f"Say {i}"} for i in range(10)])
    assert lines[0].startswith("data ") and "10 rows, form prompt_completion" in lines[0]
    start = next(i for i, line in enumerate(lines) if line.startswith("examples"))
    shown = "\n".join(lines[start + 1 :])
    assert shown.count("{+Say") == shown.count("<|im_end|>+}") == 3 and "{+Ask" not in shown
    assert [line[0] for line in lines[start + 1 :] if line[0] != " "] == ["1", "2", "3"]


def test_report_shows_both_answers_of_a_pair(told):
    rows = [{"prompt": f"Ask {i}", "chosen": f"Say {i}", "rejected": f"Shout {i}"} for i in range(10)]
    description, lines = told(rows)
    shown = "\n".join(lines)
    assert shown.count("{+Say") == 3 and shown.count("the worse answer: Shout") == 3 and "{+Shout" not in shown
    assert description["splits"]["training"]["examples"] == 9 and "form preference" in lines[0]


def test_report_counts_dropped_and_truncated_examples(told):
    rows = pairs(20) + [{"prompt": "long", "completion": "x" * 500}, {"prompt": "y" * 500, "completion": "lost"}]
    _, lines = told(rows + pairs(4) + ["7"] * 8, on_bad_row="skip", held_out=0.01)
    text = "\n".join(lines)
    assert "4 duplicates left out, 8 bad rows skipped" in lines[0]
    assert [line for line in lines if line.startswith("skipped")][0].startswith("skipped   line 27: the number 7 where")
    assert sum(line.startswith("skipped") for line in lines) == 5
    assert "1 cut off at train.max_length; 1 left out, since no answer was left within train.max_length" in text
    _, lines = told([{"text": "a" * 500}, {"text": "b" * 500}, {"text": "c"}], held_out=0.3)
    assert any("longer than train.max_length and cut into windows, " in line for line in lines)


def test_text_needs_no_template_and_its_windows_are_counted_apart_from_its_examples(told, tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    description, lines = told([{"text": f"{i}" * 500} for i in range(10)], tokenizer=bare, held_out=0.2)
    assert description["template"] is None
    training = description["splits"]["training"]
    assert (training["examples"], training["sequences"], training["cut"], training["dropped"]) == (8, 24, 8, 0)
    assert not any(line.startswith("template") for line in lines)


def test_supplied_template_is_reported(told, tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    supply_template(bare)
    description, lines = told(pairs(10), tokenizer=bare)
    assert description["template"] == "supplied" and any(line.startswith("template") for line in lines)


def test_shown_examples_are_short_and_escaped(told):
    nasty = "\x1b[2J\x07\r\u202eevil\u2028" + "\n\n".join(f"line {i} " + "w" * 500 for i in range(50))
    messages = [{"role": role, "content": nasty} for role in ("user", "assistant") * 20]
    rows = [{"messages": [{"role": "system", "content": str(i)}, *messages], "\x1bcol": 1} for i in range(4)]
    _, lines = told([*rows, '"\x1b"'], on_bad_row="skip", max_length=10**6)
    assert len(lines) < 80 and max(map(len, lines)) < 400
    assert not any(character in "".join(lines) for character in "\x1b\x07\r\n\u202e\u2028")
    assert any("\\x1b[2J" in line for line in lines)


def answers(*texts):
    return [Example(({"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": t}))
            for i, t in enumerate(texts)]  # fmt: skip


def test_an_answer_that_training_has_too_is_counted():
    train = answers("Yes!", "It is  Paris, of course.", " ".join(WORDS))
    held_out = answers("yes", "it is Paris of course", "It is Rome.", " ".join(WORDS))
    assert overlap(train, held_out) == Overlap(compared=4, same=3, near=1, answers=4, trained=0)


def test_single_answers_that_training_has_in_the_same_context_are_counted(told):
    hello = {"role": "assistant", "content": "Hello!"}
    rows = [
        {"messages": [hello, {"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}]}
        for i in range(20)
    ]
    description, lines = told(rows, held_out=0.2)
    assert (description["overlap"]["answers"], description["overlap"]["trained"]) == (8, 4)
    assert description["overlap"]["same"] == 0
    said = "4 of 8 held-out answers are also trained on in exactly the same context"
    assert any(line.endswith(said) for line in lines)
    description, _ = told(rows, held_out=0.2, loss_on="completion")
    assert (description["overlap"]["answers"], description["overlap"]["trained"]) == (4, 0)


@pytest.mark.parametrize(
    ("copied", "is_near"), [(12, True), (10, True), (9, False), (7, False), (0, False)]
)  # of twelve words: five runs of eight, of which 5, 3, 2, 0 and 0 are copied
def test_an_answer_of_which_half_the_runs_of_words_are_in_training_is_near(copied, is_near):
    changed = WORDS[:copied] + [f"other{i}" for i in range(12 - copied)]
    found = overlap(answers("Before. " + " ".join(WORDS).upper() + ", after"), answers(" ".join(changed)))
    assert (found.near, found.same) == (int(is_near), 0)


def test_shared_text_runs_do_not_cross_examples():
    long = [f"w{i}" for i in range(24)]
    halves = answers(" ".join(long[:12]), " ".join(long[12:]))
    assert overlap(halves, answers(" ".join(long))).near == 1  # 10 of 17
    quarters = answers(*(" ".join(long[i : i + 6]) for i in range(0, 24, 6)))
    assert overlap(quarters, answers(" ".join(long))).near == 0
    assert overlap(answers(" ".join(long)), quarters).near == 0  # too short to tell


def test_writing_without_spaces_is_compared_by_its_characters():
    text = "吾輩は猫である。名前はまだ無い。"
    assert overlap(answers(f"はい、{text}"), answers(text)) == Overlap(compared=1, same=0, near=1, answers=1, trained=0)


def test_texts_are_compared_like_answers_and_prompts_are_not():
    question = {"role": "user", "content": " ".join(WORDS)}
    first, second = (Example((question, {"role": "assistant", "content": answer})) for answer in "ab")
    assert overlap([first], [second]).near == 0
    assert overlap([Example(text=" ".join(WORDS) + " more")], [Example(text=" ".join(WORDS))]).near == 1
    assert overlap([], answers("a")) == Overlap(1, 0, 0, 1, 0) and overlap(answers("a"), []) == Overlap(0, 0, 0, 0, 0)
