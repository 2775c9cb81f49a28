"""What is in a file, and what happens: data files of every kind and form, good and bad.

Every row of the tables below is a whole file, as it would lie on a disk.
"""

from __future__ import annotations

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import Data
from pipeline.data import check_source, load_examples
from pipeline.data.json_array import read_array
from pipeline.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

BOM = b"\xef\xbb\xbf"
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
OTHER = [{"role": "user", "content": "R"}, {"role": "assistant", "content": "A"}]
SHARED = [{"from": "human", "value": "R"}, {"from": "gpt", "value": "A"}]


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def pairs(*numbers):
    return [{"prompt": f"p{n}", "completion": f"c{n}"} for n in numbers]


def table(*rows):
    """The bytes of a Parquet file."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def bad_text():
    """A Parquet file whose third text is not UTF-8."""
    prompts = pyarrow.array([b"p", b"q", b"\xff", b"r"]).view(pyarrow.string())
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"prompt": prompts, "completion": ["c"] * 4}), sink)
    return sink.getvalue().to_pybytes()


def packed(content):
    return gzip.compress(content if isinstance(content, bytes) else content.encode())


# What it is: (name of the file, what is in it, the form found, what is learned of its rows in any order).
GOOD = {
    "JSON lines of messages": ("a.jsonl", lines({"messages": CHAT}, {"messages": OTHER}), "messages", ["A", "A"]),
    "JSON lines by another name": ("a.ndjson", lines(*pairs(1, 2)), "prompt_completion", ["c1", "c2"]),
    "JSON lines in a .json file": ("a.json", lines(*pairs(1, 2)), "prompt_completion", ["c1", "c2"]),
    "JSON lines in capitals": ("A.JSONL", lines(*pairs(1, 2)), "prompt_completion", ["c1", "c2"]),
    "JSON lines with a byte order mark": ("a.jsonl", BOM + lines(*pairs(1, 2)).encode(), "prompt_completion", None),
    "JSON lines of ShareGPT": ("a.jsonl", lines({"conversations": SHARED}, {"conversations": CHAT}), "messages", None),
    "JSON lines of questions": (
        "a.jsonl", lines({"question": "Q", "answer": "A"}, {"question": "R", "answer": "B"}), "question_answer",
        ["A", "B"],
    ),
    "JSON lines of instructions": (
        "a.jsonl", lines({"instruction": "I", "input": "x", "output": "A"}, {"instruction": "J", "output": "B"}),
        "instruction", ["A", "B"],
    ),
    "JSON lines of text": ("a.jsonl", lines({"text": "One."}, {"text": "Two.\n"}), "text", ["One.", "Two.\n"]),
    "a JSON array": ("a.json", json.dumps(pairs(1, 2)), "prompt_completion", ["c1", "c2"]),
    "a JSON array over many lines": ("a.json", json.dumps(pairs(1, 2), indent=4) + "\n\n", "prompt_completion", None),
    "a JSON array with a byte order mark": (
        "a.json", BOM + json.dumps(pairs(1, 2)).encode(), "prompt_completion", None,
    ),
    "a JSON array under data": (
        "a.json", json.dumps({"data": [{"messages": CHAT}, {"messages": OTHER}]}, indent=1), "messages", ["A", "A"],
    ),
    "a JSON array of text": ("a.json", json.dumps([{"text": "[1"}, {"text": "}]"}]), "text", ["[1", "}]"]),
    "CSV": ("a.csv", "prompt,completion\np1,c1\np2,c2\n", "prompt_completion", ["c1", "c2"]),
    "CSV from a spreadsheet": (
        "a.csv", BOM + b'prompt,completion\r\n"p ""1""","c,\r\n1"\r\np2,c2\r\n', "prompt_completion", ["c,\r\n1", "c2"],
    ),
    "CSV with empty lines and columns of no use": (
        "a.csv", "id,question,answer\n\n1,Q,A\n\n2,R,\" B\"\n\n", "question_answer", ["A", " B"],
    ),
    "CSV with an empty input": (
        "a.csv", "instruction,input,output\nI,,A\nJ,x,B\n", "instruction", ["A", "B"],
    ),
    "CSV of text with a long cell": ("a.csv", "text\n" + "word " * 60_000 + "\nshort\n", "text", None),
    "TSV with quotes inside": ("a.tsv", 'prompt\tcompletion\np, 1\tsay "c1"\np2\t"c\t2"\n', "prompt_completion",
                               ['say "c1"', "c\t2"]),
    "Parquet of pairs": ("a.parquet", table(*pairs(1, 2)), "prompt_completion", ["c1", "c2"]),
    "Parquet of messages": (
        "a.parquet", table({"messages": CHAT, "id": b"\xff"}, {"messages": OTHER, "id": b""}), "messages", ["A", "A"],
    ),
    "Parquet with nulls where JSON has nothing": (
        "a.parquet", table({"instruction": "I", "input": None, "output": "A"},
                           {"instruction": "J", "input": "x", "output": "B"}), "instruction", ["A", "B"],
    ),
    "Parquet of mixed conversations": (
        "a.parquet", table({"conversations": CHAT}, {"conversations": SHARED}), "messages", ["A", "A"],
    ),
    "text of paragraphs": ("a.txt", "\n\nOne\nand a half.\r\n \n\nTwo.\n\n", "text", ["One\nand a half.", "Two."]),
    "text of lines": ("a.txt", BOM + "One.\nZwei, größer.\n".encode(), "text", ["One.", "Zwei, größer."]),
    "packed JSON lines": ("a.jsonl.gz", packed(lines(*pairs(1, 2))), "prompt_completion", ["c1", "c2"]),
    "packed JSON lines in two parts": (
        "a.ndjson.gz", packed(lines(*pairs(1)) + "\n") + packed(lines(*pairs(2))), "prompt_completion", ["c1", "c2"],
    ),
    "packed JSON": ("A.JSON.GZ", packed(json.dumps({"data": pairs(1, 2)})), "prompt_completion", ["c1", "c2"]),
    "packed CSV": ("a.csv.gz", packed("prompt,completion\np1,c1\np2,c2\n"), "prompt_completion", ["c1", "c2"]),
    "packed TSV": ("a.b.tsv.gz", packed("prompt\tcompletion\np1\tc1\np2\tc2\n"), "prompt_completion", ["c1", "c2"]),
    "packed text": ("a.txt.gz", packed("One.\n\nTwo.\n"), "text", ["One.", "Two."]),
}  # fmt: skip

# What it is: (name of the file, what is in it, what the error says behind the file's name).
BAD = {
    "an empty file": ("a.jsonl", "", ": has no rows"),
    "an empty JSON array": ("a.json", "[ ]", ": has no rows"),
    "an empty array under data": ("a.json", '{"data": []}', ": has no rows"),
    "an empty CSV": ("a.csv", "", ": has no rows"),
    "a CSV of nothing but a header": ("a.csv", "prompt,completion\n", ": has no rows"),
    "an empty TSV": ("a.tsv", "\n\n", ": has no rows"),
    "a Parquet file of no rows": ("a.parquet", table(*pairs(1))[:0] or b"", ": not a Parquet file"),
    "JSON lines with a broken line": (
        "a.jsonl", lines(*pairs(1, 2)) + '\n{"prompt"', ", line 3: not valid JSON at column",
    ),
    "an array in a .jsonl file": ("a.jsonl", json.dumps(pairs(1, 2)), ", line 1: a list where one JSON object a line"),
    "an object over many lines in a .jsonl file": (
        "a.jsonl", json.dumps(pairs(1)[0], indent=1), ", line 1: not valid JSON",
    ),
    "an object over many lines in a .json file": (
        "a.json", json.dumps({"rows": pairs(1, 2)}, indent=1), "a .json file holds an array of objects",
    ),
    "an object of something else": ("a.json", json.dumps({"train": pairs(1, 2)}), ", line 1: no known form"),
    "an object of columns": ("a.json", '{"prompt": ["p"], "completion": ["c"]}', ", line 1: columns, not rows"),
    "columns as pandas writes them": ("a.json", '{"prompt": {"0": "p"}, "completion": {"0": "c"}}', "orient='records'"),
    "an array that is not closed": (
        "a.json", json.dumps(pairs(1, 2))[:-1], ", row 2 (line 1): not valid JSON: a comma or",
    ),
    "an array that breaks off": ("a.json", json.dumps(pairs(1, 2), indent=1)[:-20], ", row 2 (line 6): not valid JSON"),
    "an array with a comma too many": ("a.json", '[{"text": "t"},\n]', "a comma behind the last row"),
    "an array with a comma too few": (
        "a.json", '[{"text": "t"}\n{"text": "u"}]', ", row 1 (line 1): not valid JSON: a comma",
    ),
    "something behind the array": ("a.json", '[{"text": "t"}]\n[]', ", line 2: not valid JSON: something follows"),
    "something behind the data": ("a.json", '{"data": [{"text": "t"}], "n": 1}', "something follows the rows"),
    "an array of texts": ("a.json", '["one", "two"]', ", row 1 (line 1): the text one where an object"),
    "an array with a broken row": (
        "a.json", '[{"text": "t"},\n {"text": oops}]', ", row 2 (line 2): not valid JSON: Expecting",
    ),
    "an array with a key twice": (
        "a.json", '[{"text": "t"},\n {"text": "u", "text": "v"}]', ", row 2 (line 2): the key 'text'",
    ),
    "an array with NaN": ("a.json", '[{"text": "t"},\n\n {"text": NaN}]', ", row 2 (line 3): NaN is no JSON value"),
    "an array nested without end": ("a.json", "[" * 100_000, ", row 1 (line 1): not valid JSON: nested too deeply"),
    "an array that is not UTF-8": ("a.json", b'[{"text": "caf\xe9"}]', ": not UTF-8 behind line 1"),
    "JSON that is a number": ("a.json", "42", ", line 1: the number 42"),
    "a ragged CSV": (
        "a.csv", 'prompt,completion\n"p\n1",c1\np2,c2,x\n', ", row 2 (line 4): 3 cell(s) for 2 columns",
    ),
    "a short row of CSV": (
        "a.csv", "prompt,completion\np1,c1\n\np2\n", ", row 2 (line 4): 1 cell(s) for 2 columns",
    ),
    "an empty cell": ("a.csv", "prompt,completion\np1,c1\np2,\n", ", row 2 (line 3): `completion` is empty"),
    "quotes that never close": (
        "a.csv", 'prompt,completion\np1,"c1\np2,c2\n', ", line 2: the quotes that open here are never",
    ),
    "text behind quotes": ("a.csv", 'prompt,completion\n"p" 1,c\np2,c2\n', ", row 1 (line 2): ',' expected after '\"'"),
    "a CSV that is not UTF-8": ("a.csv", b"prompt,completion\np1,c1\np2,caf\xe9\n", ", row 2 (line 3): not UTF-8"),
    "a CSV in UTF-16": ("a.csv", "prompt,completion\np1,c1\n".encode("utf-16"), ", header: not UTF-8"),
    "a CSV with semicolons": ("a.csv", "prompt;completion\np1;c1\n", "is one column; a file of this ending has commas"),
    "a TSV with commas": ("a.tsv", "prompt,completion\np1,c1\n", "is one column; a file of this ending has tabs"),
    "a header with a name twice": ("a.csv", "prompt,prompt\np,c\n", ", header: the column 'prompt' stands twice"),
    "a header with a name missing": ("a.csv", "prompt,,completion\np,x,c\n", ", header: column 2 is called ''"),
    "a header with spaces": ("a.csv", "prompt, completion\np,c\n", ", header: column 2 is called ' completion'"),
    "a CSV without a header": ("a.csv", "p1,c1\np2,c2\n", ": no known form: columns found are p1, c1"),
    "messages in a CSV": ("a.csv", 'messages\n"[{""role"": ""user""}]"\n', ", row 1 (line 2): `messages` is the text"),
    "a file that is no Parquet": ("a.parquet", "prompt,completion\np,c\n", ": not a Parquet file, or a damaged one"),
    "a Parquet file cut short": ("a.parquet", table(*pairs(1, 2))[:-20], ": not a Parquet file, or a damaged one"),
    "a Parquet file with a null": (
        "a.parquet", table(*pairs(1), {"prompt": "p", "completion": None}), ", row 2: `completion` is",
    ),
    "a Parquet file with numbers": (
        "a.parquet", table({"question": "Q", "answer": 4}), ", row 1: `answer` is the number 4",
    ),
    "a Parquet file of another form": (
        "a.parquet", table({"url": "u", "body": "b"}), ": no known form: columns found are url, body",
    ),
    "a Parquet file that is not UTF-8": ("a.parquet", bad_text(), ", row 3: not UTF-8"),
    "a speaker who could be anybody": (
        "a.jsonl", lines({"conversations": [{"from": "bing", "value": "Q"}]}), ", line 1: message 1 of `conversations`",
    ),
    "text that is empty": ("a.jsonl", lines({"text": "t"}, {"text": "  "}), ", line 2: `text` is empty"),
    "a packed file cut short": ("a.jsonl.gz", packed(lines(*pairs(1, 2)))[:-20], ": not a gzip file, or a damaged one"),
    "a packed array cut short": ("a.json.gz", packed(json.dumps(pairs(1, 2)))[:-20], ": not a gzip file, or a damaged"),
    "a packed table of other bytes": ("a.csv.gz", b"\x1f\x8b\x08" + bytes(7) + b"x" * 50, ": not a gzip file, or a"),
    "a text that is not packed": ("a.txt.gz", "One.\n\nTwo.", ": not a gzip file, or a damaged one (Not a gzipped"),
    "a bad line in a packed file": ("a.jsonl.gz", packed(lines(*pairs(1), 7)), ", line 2: the number 7"),
    "a packed Parquet file": ("a.parquet.gz", packed(b"PAR1"), ": .gz is packed; unpack it first"),
    "a file packed in another way": ("a.jsonl.zst", b"\x28", ": .zst is packed; unpack it first"),
    "a workbook": (
        "a.xlsx", b"PK", ": .xlsx is not read here; supported are .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet",
    ),
    "an empty text": ("a.txt", "\n \n", ": has no rows"),
    "a text that is not UTF-8": ("a.txt", b"One.\n\nTwo.\ncaf\xe9\n", ", line 3: not UTF-8"),
    "a file without an ending": ("data", lines(*pairs(1)), ": no ending is not read here"),
}  # fmt: skip


def write(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path / name)


@pytest.mark.parametrize(("name", "content", "form", "learned"), GOOD.values(), ids=GOOD)
def test_a_good_file_is_read(tmp_path, name, content, form, learned):
    source = write(tmp_path, name, content)
    check_source(Data(source=source))
    data = load_examples(Data(source=source))
    assert (data.form, data.rows, data.duplicates, data.skipped.total) == (form, 2, 0, 0)
    examples = data.train + data.held_out
    assert len(examples) == 2
    if learned is not None:
        assert sorted(text for example in examples for text in example.learned()) == sorted(learned)


@pytest.mark.parametrize(("name", "content", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_one_line_before_any_work(tmp_path, name, content, reason):
    source = write(tmp_path, name, content)
    for refuse in (check_source, load_examples):
        with pytest.raises(DataError) as caught:
            refuse(Data(source=source))
        message = str(caught.value)
        assert message.startswith(source) and reason in message.removeprefix(source)
        assert "\n" not in message and len(message) < len(source) + 300


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no rows"):
        check_source(Data(source=str(tmp_path / "a.parquet")))


def as_file(tmp_path, kind, rows):
    def separated(mark):
        def cell(value):
            return '"' + value.replace('"', '""') + '"'

        return "\n".join(mark.join(map(cell, row)) for row in [list(rows[0]), *(row.values() for row in rows)])

    content = {
        ".jsonl": lambda: lines(*rows),
        ".json": lambda: json.dumps(rows, indent=2),
        ".csv": lambda: separated(","),
        ".tsv": lambda: separated("\t"),
        ".parquet": lambda: table(*rows),
    }[kind]()
    return write(tmp_path, f"rows{kind}", content)


def test_the_same_rows_are_the_same_data_whatever_kind_of_file_they_came_in(tmp_path):
    rows = [{"prompt": f'p "{i}", \n\t{i}', "completion": f"cé {i % 7}\r\n"} for i in range(3000)]
    found = [
        load_examples(Data(source=as_file(tmp_path, kind, rows), held_out=0.1))
        for kind in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    ]
    assert len({data.fingerprint for data in found}) == 1
    assert {(len(data.train), len(data.held_out), data.rows) for data in found} == {(2700, 300, 3000)}
    assert all(data.held_out == found[0].held_out for data in found)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_late_bad_row_is_located(tmp_path, kind):
    rows = [{"prompt": f"p{i}\n", "completion": f"c{i}"} for i in range(5000)]
    rows[4321]["completion"] = " "
    source = as_file(tmp_path, kind, rows)
    check_source(Data(source=source))  # looks at the beginning only
    where = {".jsonl": "line 4322", ".json": "row 4322 (line 17286)", ".parquet": "row 4322"}.get(kind)
    with pytest.raises(DataError) as caught:
        load_examples(Data(source=source))
    assert f", {where or 'row 4322 (line 8644)'}: `completion` is empty" in str(caught.value)


def test_a_long_item_of_an_array_is_read_whole(tmp_path):
    texts = [random.Random(i).choice(["é", "\\", '"', "1"]) * size for i, size in enumerate((5, 700_000, 3, 2_000_000))]
    rows = [{"text": f"{i} {text}", "n": 10**i} for i, text in enumerate(texts)]
    for content in (json.dumps(rows), json.dumps(rows, ensure_ascii=False)):
        data = load_examples(Data(source=write(tmp_path, "a.json", content)))
        assert {e.text for e in data.train + data.held_out} == {row["text"] for row in rows}


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_skipped_bad_rows_are_counted_and_reported(tmp_path, kind):
    rows = [{"prompt": f"p{i}", "completion": "" if i % 10 == 3 else f"c{i}"} for i in range(200)]
    skipped = []
    data = load_examples(
        Data(source=as_file(tmp_path, kind, rows), on_bad_row="skip"),
        on_skip=lambda where, why: skipped.append((where, why)),
    )
    assert (data.rows, data.skipped.total, len(data.train) + len(data.held_out)) == (200, 20, 180)
    assert data.skipped.first == tuple(skipped[:10]) and len(skipped) == 20
    assert skipped[0][0].startswith("line 4" if kind == ".jsonl" else "row 4")
    assert skipped[0][1] == "`completion` is empty; write something, or remove the row"
    good = as_file(tmp_path, kind, [row for row in rows if row["completion"]])
    assert load_examples(Data(source=good)).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("name", "bad", "good", "end"),
    [
        ("a.jsonl", '{"text": \n[1]\n7\n{"txt": "t"}\n', '{"text": "%s"}\n', ""),
        ("a.json", '[{"text": NaN},\n7, {"a": 1, "a": 2}, "x"', ',{"text": "%s"}', "]"),
        ("a.csv", 'text\na,b\n"a" b\n"", \n,,\n', "%s\n", ""),
    ],
)
def test_rows_that_cannot_even_be_read_are_skipped_like_others(tmp_path, name, bad, good, end):
    content = bad + "".join(good % f"t{i}" for i in range(6)) + end
    data = load_examples(Data(source=write(tmp_path, name, content), on_bad_row="skip"))
    assert (data.rows, data.skipped.total, len(data.train) + len(data.held_out)) == (10, 4, 6)


def test_a_set_of_which_more_than_half_is_bad_is_refused_all_the_same(tmp_path):
    def load(good, bad):
        rows = [{"prompt": f"p{i}", "completion": f"c{i}" if i >= bad else None} for i in range(good + bad)]
        return load_examples(Data(source=write(tmp_path, "a.jsonl", lines(*rows)), on_bad_row="skip"))

    assert load(good=10, bad=10).skipped.total == 10
    for good, bad, of in ((10, 11, "11 of 21"), (0, 3, "3 of 3")):
        with pytest.raises(DataError) as caught:
            load(good, bad)
        assert f"{of} rows are bad, too many to skip; the first is line 1: " in str(caught.value)


def test_a_file_that_is_broken_beyond_a_row_is_refused_even_when_rows_may_be_skipped(tmp_path):
    rows = "".join(f"p{i},c{i}\n" for i in range(50))
    for name, content in (
        ("a.csv", f'prompt,completion\n{rows}p,"c\n{rows}'),
        ("a.json", json.dumps(pairs(*range(50)))[:-9]),
        ("a.parquet", table(*pairs(*range(50)))[:-9]),
    ):
        with pytest.raises(DataError, match="never closed|not valid JSON|not a Parquet"):
            load_examples(Data(source=write(tmp_path, name, content), on_bad_row="skip"))


def test_first_rows_may_be_bad_if_rows_are_skipped(tmp_path):
    rows = [{"unknown": 1}] * 12 + pairs(*range(20))
    source = write(tmp_path, "a.jsonl", lines(*rows))
    check_source(Data(source=source, on_bad_row="skip"))
    assert load_examples(Data(source=source, on_bad_row="skip")).skipped.total == 12


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    rows=st.lists(JSON, max_size=5),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    wrapped=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_an_array_gives_the_rows_that_were_written(tmp_path_factory, rows, indent, ascii_only, wrapped):
    content = json.dumps({"data": rows} if wrapped else rows, indent=indent, ensure_ascii=ascii_only)
    try:
        content = content.encode()
    except UnicodeEncodeError:  # half a character can only be written as an escape
        return
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_bytes(content)
    found = list(read_array(path, "a.json", closing="}" if wrapped else ""))
    assert [row for _, row in found] == rows
    assert [where.split(" (")[0] for where, _ in found] == [f"row {n}" for n in range(1, len(rows) + 1)]


@pytest.mark.parametrize(("wrapped", "rows"), [(False, ".[]"), (True, ".data[]")])
def test_an_array_too_large_for_memory_is_refused_with_the_way_to_json_lines(tmp_path, monkeypatch, wrapped, rows):
    monkeypatch.setattr("pipeline.data.json_array.LARGEST_BYTES", 50)
    content = json.dumps({"data": pairs(1, 2)} if wrapped else pairs(1, 2))
    source = write(tmp_path, "a.json", content)
    with pytest.raises(DataError) as caught:
        load_examples(Data(source=source))
    assert "too large for a JSON array" in str(caught.value)
    assert f"Try: jq -c '{rows}' {source} > " in str(caught.value)
