"""Rows in every form become conversations; malformed ones are refused in one line that says where."""

import json

import pytest

from pipeline.catalog import DATA_FORMS
from pipeline.config import Data
from pipeline.data import check_source, load_examples
from pipeline.data.forms import FORMS, to_example
from pipeline.errors import DataError

GOOD = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'


def load(tmp_path, content, name="data.jsonl", **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_examples(Data(source=str(path), **options))


def conversation(*messages):
    return json.dumps({"messages": [dict(zip(("role", "content"), m, strict=True)) for m in messages]})


def test_the_forms_are_those_of_the_catalog():
    assert list(FORMS) == list(DATA_FORMS)


def test_a_prompt_and_its_completion_become_two_messages():
    example = to_example({"prompt": "2+2?", "completion": " 4"}, "prompt_completion", "f, row 1")
    assert example.messages == ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " 4"})


def test_prompt_and_completion_may_be_lists_of_messages():
    row = {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        "completion": [{"role": "assistant", "content": "A"}],
    }
    example = to_example(row, "prompt_completion", "f, row 1")
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant"]


def test_fields_of_a_message_that_change_nothing_are_left_out():
    row = {"messages": [{"role": "assistant", "content": "A", "id": 7, "tool_calls": None}], "source": "x"}
    assert to_example(row, "messages", "f, row 1").messages == ({"role": "assistant", "content": "A"},)


def test_a_tool_may_answer_nothing():
    messages = [{"role": "tool", "content": ""}, {"role": "assistant", "content": "Done."}]
    assert to_example({"messages": messages}, "messages", "f, row 1").messages[0]["content"] == ""


def test_auto_finds_the_form(tmp_path):
    rows = "\n".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(3))
    assert load(tmp_path, rows).form == "prompt_completion"
    assert load(tmp_path, GOOD + "\n" + conversation(("user", "q"), ("assistant", "a"))).form == "messages"


def test_a_demanded_form_that_is_not_there_names_the_columns_found(tmp_path):
    with pytest.raises(DataError, match="prompt and completion; found are messages, id"):
        load(tmp_path, GOOD[:-1] + ', "id": 1}', form="prompt_completion")


def test_a_byte_order_mark_and_blank_lines_and_windows_line_ends_are_fine(tmp_path):
    data = load(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n  \n" + GOOD.replace("Q", "R").encode())
    assert data.rows == 2


def test_line_numbers_count_blank_lines(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl, row 4: not valid JSON at column 2"):
        load(tmp_path, f"{GOOD}\n\n\n{{")


BAD_ROWS = {
    "truncated JSON": ('{"messages": [', "not valid JSON at column 15"),
    "no JSON at all": ("hello", "not valid JSON at column 1"),
    "a list": ('["prompt", "completion"]', "one JSON object a line"),
    "a number": ("42", "the number 42"),
    "a text": ('"text"', "object"),
    "null": ("null", "null"),
    "NaN": ('{"messages": NaN}', "NaN is no JSON value"),
    "a key that stands twice": ('{"messages": [], "messages": []}', "'messages' stands twice"),
    "a number of 5000 digits": ('{"messages": ' + "1" * 5000 + "}", "row 2"),
    "nesting without end": ("[" * 100_000, "row 2"),
    "an object nested without end": ('{"a":' * 100_000, "nested too deeply"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8 at byte 15"),
    "another form": ('{"prompt": "p", "completion": "c"}', "no `messages`"),
    "messages that are text": ('{"messages": "Q"}', "a list of messages is expected"),
    "no messages": ('{"messages": []}', "is empty"),
    "messages that are null": ('{"messages": null}', "null"),
    "a message that is text": ('{"messages": ["Q"]}', "message 1 of `messages` is the text Q"),
    "a message without role": ('{"messages": [{"content": "Q"}]}', "has no `role`; found are content"),
    "a message without content": ('{"messages": [{"role": "user"}]}', "has no `content`; found are role"),
    "an unknown role": (conversation(("bot", "A")), "role bot; allowed are system, user, assistant, tool"),
    "a role that is a list": ('{"messages": [{"role": [], "content": "A"}]}', "role []"),
    "content that is a list": (conversation(("assistant", [{"type": "text"}])), "text in quotes is expected"),
    "content that is null": (conversation(("assistant", None)), "null"),
    "content that is a number": (conversation(("assistant", 1)), "the number 1"),
    "empty content": (conversation(("user", ""), ("assistant", "A")), "message 1 of `messages` is empty"),
    "an answer of white space": (conversation(("user", "Q"), ("assistant", " \n")), "message 2 of `messages` is empty"),
    "no answer": (conversation(("user", "Q")), "no message by the assistant"),
    "a late system message": (conversation(("user", "Q"), ("system", "S"), ("assistant", "A")), "move it to the front"),
    "half a character": (conversation(("assistant", "\ud83d")), "half a character (\\ud83d)"),
    "a call of a tool": (
        '{"messages": [{"role": "assistant", "content": "A", "tool_calls": [{"id": 1}]}]}',
        "`tool_calls`, which is not supported",
    ),
    "tools": (GOOD[:-1] + ', "tools": [{"name": "f"}]}', "`tools` is not supported"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_in_one_line_that_names_it(tmp_path, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data.jsonl'}, row 2: ")
    assert reason in message and "\n" not in message
    assert len(message) < len(str(tmp_path)) + 250


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p"}, "no `completion`; every row needs prompt and completion"),
        ({"prompt": "p", "completion": None}, "`completion` is the value null"),
        ({"prompt": 3, "completion": "c"}, "`prompt` is the number 3"),
        ({"prompt": "", "completion": "c"}, "`prompt` is empty"),
        ({"prompt": "p", "completion": [{"role": "user", "content": "u"}]}, "no message by the assistant"),
        ({"prompt": "p", "completion": "x", "tools": [1]}, "`tools` is not supported"),
        ({"prompt": "p", "completion": {"text": "x" * 1000}}, "xxx..."),
    ],
)
def test_a_bad_pair_is_refused(row, reason):
    with pytest.raises(DataError) as caught:
        to_example(row, "prompt_completion", "pairs.jsonl, row 9")
    assert str(caught.value).startswith("pairs.jsonl, row 9: ") and reason in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("7\n" + GOOD, "row 1: the number 7"),
        ('{"text": "t", "label": 1}', "columns found are text, label"),
        ("{}", "columns found are none"),
        ('[\n{"prompt": "p", "completion": "c"}\n]', "row 1: a list"),
        ("{\n", "row 1: not valid JSON"),
        (GOOD.encode("utf-16"), "row 1: not UTF-8"),
    ],
)
def test_a_file_that_starts_wrong_is_refused_before_any_work(tmp_path, content, reason):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for refuse in (check_source, load_examples):
        with pytest.raises(DataError) as caught:
            refuse(Data(source=str(path)))
        assert reason in str(caught.value) and "\n" not in str(caught.value)
