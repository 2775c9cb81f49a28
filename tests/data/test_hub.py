"""Data sets on the Hub: read over HTTP at one recorded commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pipeline.config.schema import Data
from pipeline.data import load_examples
from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub

pytest.importorskip("datasets")

TOKEN = "hf_ada"
CARD = b"---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Rows\n"
SUBSETS = """---
license: [apache-2.0, mit]
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files: [{split: train, path: hard.jsonl}, {split: test, path: test.jsonl}]
---
"""

# Loads what stands on standard input, in one process, since importing the library takes the most time.
SCRIPT = """
import dataclasses, json, sys
from pipeline.config.schema import Data
from pipeline.data import load_examples
from pipeline.errors import DataError
found = {}
for name, options in json.load(sys.stdin).items():
    try:
        found[name] = dataclasses.asdict(load_examples(Data(**options)))
    except DataError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def pairs(*numbers):
    return [{"prompt": f"p{n}", "completion": f"c{n}"} for n in numbers]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def load(cases, **environment):
    """What each case becomes in a process that sees only this Hub: the data set's fields, or the error's line."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(cases),
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CASES = {
    "the newest": {"source": "ada/rows"},
    "a tag": {"source": "ada/rows", "revision": "first"},
    "a slice": {"source": "ada/rows", "split": "train[:5]"},
    "a subset": {"source": "ada/subsets", "subset": "hard", "split": "test"},
    "named columns": {"source": "ada/named", "columns": {"question": "ask", "answer": "reply"}},
    "Parquet": {"source": "ada/parquet"},
    "skipped": {"source": "ada/null", "on_bad_row": "skip"},
    "a null": {"source": "ada/null"},
    "no form": {"source": "ada/scores"},
    "no subset": {"source": "ada/subsets"},
    "a wrong subset": {"source": "ada/subsets", "subset": "medium"},
    "a wrong split": {"source": "ada/rows", "split": "dev"},
    "a split that is none": {"source": "ada/rows", "split": "train[:x]"},
    "a wrong revision": {"source": "ada/rows", "revision": "v9"},
    "nothing": {"source": "ada/nothing"},
    "no rows": {"source": "ada/empty"},
    "a script": {"source": "ada/script"},
    "broken JSON": {"source": "ada/broken"},
    "other columns": {"source": "ada/others"},
    "late columns": {"source": "ada/late"},
    "tools": {"source": "ada/tools"},
    "pictures": {"source": "ada/pictures"},
    "ignored pictures": {"source": "ada/pictures", "ignore": ["images"]},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:

        def put(name, **files):
            content = {path.replace("__", "."): held for path, held in files.items()}
            hub.put(f"ada/{name}", content, repo_type="dataset", private=True)

        put("rows", rows__jsonl=lines(pairs(*range(10))), README__md=CARD)
        hub.first = hub.commits("ada/rows", repo_type="dataset")[0]
        put("rows", rows__jsonl=lines(pairs(*range(20))))
        hub.newest = hub.commits("ada/rows", repo_type="dataset")[0]
        hub.repo("ada/rows", "dataset").tags["first"] = hub.first
        put(
            "subsets",
            README__md=SUBSETS.encode(),
            easy__jsonl=lines(pairs(*range(4))),
            hard__jsonl=lines(pairs(*range(5))),
            test__jsonl=lines(pairs(*range(6))),
        )
        put("named", rows__csv=b"id,ask,reply\n1,Q,A\n2,R,B\n")
        chats = [
            {"conversations": [{"from": "human", "value": f"Q{n}"}, {"from": "gpt", "value": "A"}]} for n in (1, 2)
        ]
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(chats), sink)
        put("parquet", rows__parquet=sink.getvalue().to_pybytes())
        put("null", rows__jsonl=lines([*pairs(1), {"prompt": "p", "completion": None}, *pairs(2)]))
        put("scores", rows__jsonl=lines([{"url": "u", "score": 1}]))
        put("empty", README__md=b"# Nothing yet")
        put("script", script__py=b"import datasets")
        rows = [{"instruction": f"I{n}", "output": "A"} for n in range(3)]
        put("others", a__jsonl=lines(rows), b__jsonl=lines([rows[0] | {"input": "x"}]))
        put("late", a__jsonl=lines([*rows, {"instruction": "I", "input": "x", "output": "A", "note": "n"}]))
        calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": None, "c": "x"}}]
        put("tools", a__jsonl=lines([
            {"messages": [{"role": "user", "content": call["name"]}, {"role": "assistant", "tool_calls": [call]}]}
            for call in calls
        ]))  # fmt: skip
        sink = pyarrow.BufferOutputStream()
        pictures = [{"prompt": f"p{n}", "completion": "c", "images": [{"bytes": b"no picture"}]} for n in range(3)]
        kind = {"images": {"feature": {"_type": "Image"}, "_type": "List"}}
        kind |= {name: {"dtype": "string", "_type": "Value"} for name in ("prompt", "completion")}
        table = pyarrow.Table.from_pylist(pictures)
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kind}})})
        parquet.write_table(table, sink)
        put("pictures", rows__parquet=sink.getvalue().to_pybytes())
        put("broken", rows__jsonl=b'{"prompt": "p", "completion": "c"}\n{"prompt": \n')
        hub.environment = hub.env_for(TOKEN, folder / "home")
        yield hub


@pytest.fixture(scope="module")
def found(hub):
    return load(CASES, **hub.environment)


def test_the_commit_that_was_read_is_recorded_with_what_the_card_says(hub, found, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines(pairs(*range(20))))
    data = found["the newest"]
    assert data["fingerprint"] == load_examples(Data(source=str(tmp_path / "rows.jsonl"))).fingerprint
    assert (data["revision"], data["rows"], data["form"]) == (hub.newest, 20, "prompt_completion")
    assert (data["license"], data["language"], data["subset"], data["split"]) == ("apache-2.0", "en", None, "train")


def test_an_older_revision_is_read_and_recorded_as_the_commit_it_is(hub, found):
    assert (found["a tag"]["revision"], found["a tag"]["rows"]) == (hub.first, 10)


def test_splits_slices_subsets_and_named_columns_are_taken(found):
    assert found["a slice"]["rows"] == 5 and found["a slice"]["split"] == "train[:5]"
    assert (found["a subset"]["rows"], found["a subset"]["subset"]) == (6, "hard")
    assert found["a subset"]["license"] == "apache-2.0, mit"
    assert (found["named columns"]["form"], found["named columns"]["unused"]) == ("question_answer", ["id"])
    assert (found["Parquet"]["form"], found["Parquet"]["rows"]) == ("messages", 2)
    assert found["named columns"]["license"] is None


def test_columns_of_later_rows_are_read_and_named(found):
    late = found["late columns"]
    assert any("x" in m["content"] for e in late["train"] + late["held_out"] for m in e["messages"])
    assert late["unused"] == ["note"]


def test_keys_that_arrow_fills_in_are_no_arguments_of_a_call(found):
    tools = found["tools"]
    calls = [e["messages"][1]["tool_calls"][0]["function"] for e in tools["train"] + tools["held_out"]]
    assert sorted(calls, key=lambda call: call["name"]) == [
        {"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"c": "x"}},
    ]  # fmt: skip


def test_pictures_are_refused_by_name_or_ignored_without_being_opened(found):
    assert "row 1: `images` belongs to the row, and only text is learned" in found["pictures"]
    assert (found["ignored pictures"]["rows"], found["ignored pictures"]["unused"]) == (3, ["images"])


def test_a_bad_row_is_named_or_skipped(found):
    assert found["a null"] == ("ada/null (train), row 2: `completion` is the value null; text in quotes is expected")
    skipped = found["skipped"]["skipped"]
    assert (found["skipped"]["rows"], skipped["total"], skipped["first"][0][0]) == (3, 1, "row 2")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no form", "ada/scores (train): no known form: columns found are url, score"),
        ("no subset", "ada/subsets: has several subsets ('easy', 'hard'); choose one with data.subset"),
        ("a wrong subset", "ada/subsets: no subset 'medium'; available are 'easy', 'hard'"),
        ("a wrong split", "ada/rows: no split 'dev'"),
        ("a split that is none", "ada/rows: no split 'train[:x]'"),
        ("a wrong revision", "ada/rows: no revision 'v9'; correct data.revision"),
        ("nothing", "ada/nothing: no such data set on the Hub, or it is private"),
        ("no rows", "ada/empty: has no data files; correct data.source"),
        ("a script", "ada/script: is made by a script, which is never run here"),
        ("broken JSON", "ada/broken: cannot be loaded"),
        ("other columns", "ada/others: its rows have different columns, which the datasets library"),
    ],
)
def test_unavailable_data_set_gives_one_line_with_a_remedy(found, case, reason):
    assert found[case].startswith(reason) and "\n" not in found[case]


def test_offline_cache_serves_only_the_requested_revision(hub, found):
    """The library itself takes the newest that it has, whatever revision or subset is asked for."""
    cases = {
        "cached": {"source": "ada/named", "columns": {"question": "ask", "answer": "reply"}},
        "a commit that is not there": {"source": "ada/named", "revision": "0" * 40},
        "a tag": {"source": "ada/named", "revision": "v1"},
        "some subset": {"source": "ada/subsets", "split": "test"},
        "that subset": {"source": "ada/subsets", "subset": "hard", "split": "test"},
        "never seen": {"source": "ada/nothing"},
    }
    offline = load(cases, **hub.environment, HF_HUB_OFFLINE="1")
    for field in ("fingerprint", "revision", "rows"):
        assert offline["cached"][field] == found["named columns"][field]
        assert offline["that subset"][field] == found["a subset"][field]
    commit = found["named columns"]["revision"]
    for case in ("a commit that is not there", "a tag"):
        assert "cannot be looked up" in offline[case] and offline[case].endswith(f"on this machine is {commit}")
    assert "set data.subset to it" in offline["some subset"]
    assert "HF_HUB_OFFLINE" in offline["never seen"]


def test_unreachable_hub_gives_one_line(hub, tmp_path):
    found = load({"x": CASES["the newest"]}, **{**hub.environment, "HF_ENDPOINT": "http://127.0.0.1:9",
                                                "HF_HOME": str(tmp_path)})  # fmt: skip
    assert found["x"].startswith("ada/rows: the Hub cannot be reached (")
