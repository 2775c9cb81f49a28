"""Forms of rows: each becomes a conversation, and a malformed row is refused with its place."""

import json

import pytest

from pipeline.config.catalog import DATA_FORMS
from pipeline.config.schema import Data
from pipeline.data import check_source, load_examples
from pipeline.data.forms import FORMS
from pipeline.data.layout import choose_layout
from pipeline.data.rows import BadRow
from pipeline.errors import DataError

GOOD = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'


def load(tmp_path, content, name="data.jsonl", **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_examples(Data(source=str(path), **options))


def conversation(*messages):
    return json.dumps({"messages": [dict(zip(("role", "content"), m, strict=True)) for m in messages]})


def answer(role="assistant", **keys):
    return json.dumps({"messages": [{"role": role, "content": "A", **keys}]})


def example(row, form="auto", columns=None, **named):
    return choose_layout(columns or row, form, named).example(row)


def test_the_forms_are_those_of_the_catalog():
    assert list(FORMS) == list(DATA_FORMS)


def test_a_prompt_and_its_completion_become_two_messages():
    expected = ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " 4"})
    assert example({"prompt": "2+2?", "completion": " 4"}).messages == expected


def test_prompt_and_completion_may_be_lists_of_messages():
    row = {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        "completion": [{"role": "assistant", "content": "A"}],
    }
    assert [m["role"] for m in example(row).messages] == ["system", "user", "assistant"]


def test_fields_of_a_message_that_change_nothing_are_left_out():
    row = {"messages": [{"role": "assistant", "content": "A", "id": 7, "tool_calls": None}], "source": "x"}
    assert example(row).messages == ({"role": "assistant", "content": "A"},)


def test_a_tool_may_answer_nothing():
    messages = [{"role": "tool", "content": ""}, {"role": "assistant", "content": "Done."}]
    assert example({"messages": messages}).messages[0]["content"] == ""


def test_auto_finds_the_form(tmp_path):
    rows = "\n".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(3))
    assert load(tmp_path, rows).form == "prompt_completion"
    assert load(tmp_path, GOOD + "\n" + conversation(("user", "q"), ("assistant", "a"))).form == "messages"


def test_missing_form_names_the_columns_found(tmp_path):
    with pytest.raises(DataError, match="prompt and completion; found are messages, id"):
        load(tmp_path, GOOD[:-1] + ', "id": 1}', form="prompt_completion")


def test_a_byte_order_mark_and_blank_lines_and_windows_line_ends_are_fine(tmp_path):
    data = load(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n  \n" + GOOD.replace("Q", "R").encode())
    assert data.rows == 2


def test_line_numbers_count_blank_lines(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl, line 4: not valid JSON at column 2"):
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
    "a number of 5000 digits": ('{"messages": ' + "1" * 5000 + "}", "Exceeds the limit"),
    "nesting without end": ("[" * 100_000, "one JSON object a line"),
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
    "a part without text": (
        conversation(("assistant", [{"type": "text"}])),
        "part 1 of message 1 of `messages` has no `text`",
    ),
    "a part that is a picture": (
        conversation(("user", [{"type": "image_url", "image_url": {"url": "x"}}])),
        "is the type image_url; allowed are text, reasoning, tool_call",
    ),
    "a part that is text alone": (conversation(("assistant", ["A"])), "is the text A; allowed are text,"),
    "no parts": (conversation(("assistant", [])), "message 1 of `messages` is empty"),
    "content that is null": (conversation(("assistant", None)), "null"),
    "content that is a number": (conversation(("assistant", 1)), "the number 1"),
    "empty content": (conversation(("user", ""), ("assistant", "A")), "message 1 of `messages` is empty"),
    "an answer of white space": (conversation(("user", "Q"), ("assistant", " \n")), "message 2 of `messages` is empty"),
    "no answer": (conversation(("user", "Q")), "no message by the assistant"),
    "a late system message": (conversation(("user", "Q"), ("system", "S"), ("assistant", "A")), "move it to the front"),
    "characters that move a cursor": (conversation(("\x1b[2J", "A")), "has the role \\x1b[2J; allowed are"),
    "half a character": (conversation(("assistant", "\ud83d")), "half a character (\\ud83d)"),
    "a call without a name": (
        answer(tool_calls=[{"id": "1", "function": {"arguments": "{}"}}]),
        "call 1 of message 1 of `messages` has no name",
    ),
    "a call with broken arguments": (
        answer(tool_calls=[{"name": "f", "arguments": "{"}]),
        "the arguments of call 1 of message 1",
    ),
    "a call with a list for arguments": (answer(tool_calls=[{"name": "f", "arguments": [1]}]), "an object is expected"),
    "arguments that are no JSON": (answer(tool_calls=[{"name": "f", "arguments": '{"a": NaN}'}]), "is not valid JSON"),
    "arguments with half a character": (
        answer(tool_calls=[{"name": "f", "arguments": {"a": "\ud83d"}}]),
        "half a character, or is nested too deeply",
    ),
    "a call that is text": (
        conversation(("user", "Q"), ("assistant", '<tool_call>{"name": "f"}</tool_call>'))[:-1]
        + ', "tools": [{"name": "f"}]}',
        "as text (<tool_call>), so the template would write the tools twice",
    ),
    "a tool with half a character": (GOOD[:-1] + ', "tools": [{"name": "f", "x": "\\ud83d"}]}', "half a character"),
    "a tool's name that is a number": (
        answer(role="tool", name=7),
        "the name of message 1 of `messages` is the",
    ),
    "calls that are text": (answer(tool_calls="call f"), "message 1 of `messages` is not valid JSON: call f"),
    "a question that calls a tool": (
        answer(role="user", tool_calls=[{"name": "f"}]),
        "only a message by the assistant can have it",
    ),
    "a question with a call for a part": (
        conversation(("user", [{"type": "tool_call", "value": "{}"}])),
        "`tool_call` and the role user; only a message by",
    ),
    "a question that thinks": (answer(role="user", thinking="Hm"), "only a message by the assistant can have it"),
    "half a weight": (answer(weight=0.5), "has the weight 0.5; allowed are 0 (not learned) and 1 (learned)"),
    "no answer with a weight": (answer(weight=0), "every answer has weight 0"),
    **{
        f"a message with {key}": (answer(**{key: value}), f"has `{key}`, and only text is learned")
        for key, value in {
            "images": ["a.png"],
            "image": "a.png",
            "videos": ["a.mp4"],
            "video": "a.mp4",
            "audios": ["a.wav"],
            "audio": {"id": "1"},
            "refusal": "No.",
            "train_detail": [{"begin_offset": 0}],
            "prefix": True,
        }.items()
    },
    "a tool without a name": (GOOD[:-1] + ', "tools": [{"f": 1}]}', "tool 1 of `tools` has no name; found are f"),
    "tools that are no JSON": (GOOD[:-1] + ', "tools": "[{"}', "`tools` is not valid JSON"),
    "a tool that is text": (GOOD[:-1] + ', "tools": "[7]"}', "has the number 7; an object with a name is expected"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_in_one_line_that_names_it(tmp_path, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data.jsonl'}, line 2: ")
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
        ({"prompt": "p", "completion": "x", "history": "none"}, "a list of [question, answer] is expected"),
        ({"prompt": "p", "completion": "x", "history": [["q"]]}, "item 1 of `history` is the list"),
        ({"prompt": "p", "completion": "x", "history": [["q", None]]}, "item 1 of `history` is the value null"),
        ({"prompt": "p", "completion": {"text": "x" * 1000}}, "xxx..."),
    ],
)
def test_a_bad_pair_is_refused(row, reason):
    with pytest.raises(BadRow) as caught:
        example(row, columns=("prompt", "completion", "history"))
    assert reason in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("7\n" + GOOD, "line 1: the number 7"),
        ('{"body": "t", "label": 1}', "columns found are body, label"),
        ("{}", "columns found are none"),
        ("{\n", "line 1: not valid JSON"),
        (GOOD.encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_a_file_that_starts_wrong_is_refused_before_any_work(tmp_path, content, reason):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for refuse in (check_source, load_examples):
        with pytest.raises(DataError) as caught:
            refuse(Data(source=str(path)))
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def turns(*contents, system=None):
    roles = ["system"] * bool(system) + ["user", "assistant"] * len(contents)
    said = [*([system] * bool(system)), *contents]
    return tuple({"role": role, "content": content} for role, content in zip(roles, said, strict=False))


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "instruction", turns("Add.\n\n1 2", "3")),
        ({"instruction": "Add.", "input": "", "output": "3"}, "instruction", turns("Add.", "3")),
        ({"instruction": "Add.", "output": "3"}, "instruction", turns("Add.", "3")),
        ({"instruction": "Add.", "context": "1 2", "response": "3"}, "instruction", turns("Add.\n\n1 2", "3")),
        ({"instruction": "A", "output": "3", "response": "4"}, "instruction", turns("A", "3")),
        ({"question": "Q?", "answer": "A."}, "question_answer", turns("Q?", "A.")),
        ({"prompt": "p", "completion": "c", "system": "S"}, "prompt_completion", turns("p", "c", system="S")),
        ({"prompt": "p", "completion": "c", "system": None}, "prompt_completion", turns("p", "c")),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}]
             + [{"from": "gpt", "value": "A"}]},
            "messages", turns("Q", "A", system="S"),
        ),
        (
            {"conversations": [{"role": None, "from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
            "messages", turns("Q", "A"),
        ),
        ({"conversations": list(turns("Q", "A")), "id": 1}, "messages", turns("Q", "A")),
    ],
)  # fmt: skip
def test_each_form_becomes_a_conversation(row, form, expected):
    assert choose_layout(row, "auto", {}).form == form
    assert example(row).messages == expected


PAIR = {"prompt": "Q", "completion": "A"}
CHAT = {"messages": list(turns("Q", "A"))}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (CHAT | {"images": ["a.png"]}, "`images` belongs to the row, and only text is learned"),
        (PAIR | {"audio": {"path": "a.wav"}}, "`audio` belongs to the row"),
        ({"text": "T", "image": {"path": "a.png"}}, "`image` belongs to the row"),
        (CHAT | {"label": False}, "`label` is false, so people rejected this answer; set data.on_bad_row: skip"),
        (PAIR | {"label": "False"}, "`label` is false"),
        (CHAT | {"kto_tag": False}, "`kto_tag` is false"),
        (CHAT | {"chosen": "A"}, "set data.columns: {prompt: messages, completion: chosen}"),
        (PAIR | {"rejected": "B"}, "`rejected` is one of two answers"),
        (CHAT | {"rejected_response": "B"}, "`rejected_response` is one of two answers"),
        (CHAT | {"split": "test"}, "`split` is test, so the row is held back from training"),
        (PAIR | {"split": "validation"}, "`split` is validation"),
        (PAIR | {"weight": 0}, "`weight` is 0, and all rows are learned with the weight 1"),
        (PAIR | {"weight": "0.5"}, "`weight` is 0.5"),
        (CHAT | {"history": [["Q", "A"]]}, "`history` changes the conversation"),
        (PAIR | {"context": "C"}, "{instruction: prompt, input: context, output: completion}"),
        ({"question": "Q", "answer": "A", "context": "C"}, "{instruction: question, input: context, output: answer}"),
        ({"question": "Q", "answer": "A", "choices": ["A", "B"]}, "`choices` belongs to the question"),
        ({"instruction": "I", "input": "x", "context": "C", "output": "A"}, "`context` belongs to the question"),
        (
            CHAT | {"chat_template_kwargs": {"enable_thinking": False}},
            "`chat_template_kwargs` changes the conversation",
        ),
        (PAIR | {"system": "S", "system_prompt": "T"}, "`system_prompt` changes the conversation"),
    ],
)
def test_columns_that_change_the_meaning_are_refused_by_name(row, reason):
    with pytest.raises(BadRow) as caught:
        example(row)
    assert reason in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "row",
    [
        CHAT | {"images": [], "audio": None, "label": True, "split": "train", "weight": 1, "tools": []},
        PAIR | {"label": "sports", "split": "train_sft", "weight": "70 kg", "context": "", "history": []},
        {"text": "T", "label": False, "context": "C", "choices": ["A"]},
        {"question": "Q", "answer": "A", "label": 0, "weight": 1.0, "choices": None},
    ],
)
def test_columns_that_change_nothing_are_left_out(row):
    needed = {key: row[key] for key in ("messages", "prompt", "completion", "text", "question", "answer") if key in row}
    assert example(row) == example(needed)


def test_a_column_that_is_ignored_on_purpose_is_no_reason_to_refuse(tmp_path):
    rows = "\n".join(json.dumps(PAIR | {"prompt": c, "images": [c], "history": [["x", "y"]]}) for c in "QR")
    with pytest.raises(DataError, match=r"line 1: `images` .*set data.ignore: \[images\]"):
        load(tmp_path, rows)
    data = load(tmp_path, rows, ignore=["images", "history"])
    assert [turns(q, "A") in [e.messages for e in data.train + data.held_out] for q in "QR"] == [True, True]
    assert data.unused == ("images", "history")


def test_rejected_answers_are_left_out_if_bad_rows_are_skipped(tmp_path):
    rows = [PAIR | {"prompt": f"Q{i}", "label": i % 3 > 0} for i in range(9)]
    data = load(tmp_path, "\n".join(map(json.dumps, rows)), on_bad_row="skip")
    assert (data.skipped.total, len(data.train + data.held_out)) == (3, 6)
    assert data.unused == ("label",)


@pytest.mark.parametrize(
    ("row", "named", "expected"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {"completion": "chosen"}, turns("Q", "A")),
        ({"chosen": list(turns("Q", "A")), "rejected": list(turns("Q", "B"))}, {"messages": "chosen"}, turns("Q", "A")),
        (
            {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
             "rejected": {"from": "gpt", "value": "B"}},
            {"prompt": "conversations", "completion": "chosen"}, turns("Q", "A"),
        ),
    ],
)  # fmt: skip
def test_the_better_answer_of_a_preference_is_learned_if_it_is_named(row, named, expected):
    assert example(row, **named).messages == expected


SAID, OTHER = ({"role": "assistant", "content": c} for c in "AB")
ASKED = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B", "system": "S"},
        {"question": "Q", "chosen": "A", "rejected": "B", "system_prompt": "S"},
        {"prompt": ASKED, "chosen": [SAID], "rejected": [OTHER]},
        {"prompt": ASKED, "chosen": SAID, "rejected": "B"},
        {"prompt": ASKED, "chosen": [*ASKED, SAID], "rejected": [*ASKED, OTHER]},
        {"chosen": [*ASKED, SAID], "rejected": [*ASKED, OTHER | {"weight": 1}]},
        {"prompt": "Q", "system": "S", "chosen": [ASKED[1], SAID], "rejected": [ASKED[1], OTHER]},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
         "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
    ],
)  # fmt: skip
def test_two_answers_become_a_pair_with_its_prompt(row):
    found = example(row)
    assert found.messages == (*ASKED, SAID) and found.rejected == OTHER
    assert found.alternatives[1].messages == (*ASKED, OTHER) and found.learned() == ["A"]
    assert found.canonical() == example({"prompt": ASKED, "chosen": "A", "rejected": "B"}).canonical()
    assert found.canonical() != example({"prompt": ASKED, "chosen": "A", "rejected": "C"}).canonical()
    assert found.prompt() == example({"prompt": ASKED, "completion": "A"}).prompt()


def test_only_the_last_answers_of_a_pair_are_learned():
    shared = [*turns("Q1", "A1"), {"role": "user", "content": "Q2"}]
    found = example({"chosen": [*shared, SAID], "rejected": [*shared, OTHER], "tools": [{"name": "f"}]})
    assert found.answers() == [3] and len(found.contexts()) == 1 and found.tools


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "`chosen` and `rejected` are the same answer"),
        ({"prompt": "Q", "chosen": " ", "rejected": "A"}, "`chosen` is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "`rejected` is the value null"),
        ({"prompt": "Q", "chosen": [], "rejected": "A"}, "`chosen` is empty"),
        ({"chosen": "A", "rejected": "B"}, "no prompt for `chosen` and `rejected`; name its column in data.columns"),
        ({"chosen": [SAID], "rejected": [OTHER]}, "no prompt for"),
        (
            {"prompt": "Q", "chosen": list(turns("Q", "A", "R", "C")), "rejected": "B"},
            "`chosen` has 3 message(s)",
        ),
        ({"chosen": list(turns("Q", "A")), "rejected": list(turns("R", "B"))}, "`chosen` has 2 message(s) after"),
        ({"prompt": "Q", "chosen": "A", "rejected": list(turns("Q"))}, "`rejected` has 1 message(s) after the prompt"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "label": False}, "`label` is false"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(row, reason):
    with pytest.raises(BadRow) as caught:
        example(row)
    assert reason in str(caught.value)


def test_bad_pair_is_refused_with_its_place_or_skipped(tmp_path):
    rows = [{"prompt": f"Q{i}", "chosen": "A", "rejected": "A" if i == 7 else "B"} for i in range(10)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(DataError, match="line 8: `chosen` and `rejected` are the same answer"):
        load(tmp_path, lines)
    data = load(tmp_path, lines, on_bad_row="skip")
    assert (data.form, data.skipped.total, len(data.train + data.held_out)) == ("preference", 1, 9)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "I", "input": "x", "output": "A"},
        {"instruction": "I\n\nx", "response": "A"},
        {"prompt": "I\n\nx", "completion": "A"},
        {"question": "I\n\nx", "answer": "A"},
    ],
)
@pytest.mark.parametrize("shape", [lambda pairs: pairs, json.dumps])
def test_a_history_stands_before_the_question(row, shape):
    found = example(row | {"history": shape([["Q1", "A1"], ["Q2", "A2"]]), "system_prompt": "S"})
    assert found.messages == turns("Q1", "A1", "Q2", "A2", "I\n\nx", "A", system="S")
    assert found.learned() == ["A1", "A2", "A"]


def test_plain_text_stays_text_and_is_its_own_prompt():
    found = example({"text": "Once.\n", "id": 3})
    assert (found.text, found.messages, found.learned()) == ("Once.\n", (), ["Once.\n"])
    assert found.prompt() == found.canonical() != example({"text": "Twice."}).prompt()


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (("instruction", "input", "output", "text"), "instruction"),
        (("text", "question", "answer"), "question_answer"),
        (("text", "messages"), "messages"),
        (("prompt", "messages", "prompt_id"), "messages"),
        (("context", "instruction", "response", "category"), "instruction"),
        (("prompt", "chosen", "rejected", "messages", "score_chosen"), "preference"),
        (("question", "chosen", "rejected", "answer"), "preference"),
    ],
)
def test_text_is_taken_only_where_nothing_else_fits(columns, form):
    assert choose_layout(columns, "auto", {}).form == form


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (("prompt", "completion", "messages"), "several forms: messages and prompt_completion; set data.form"),
        (("instruction", "output", "question", "answer"), "several forms: instruction and question_answer"),
        (("prompt", "answers"), "columns found are prompt, answers; rename them, or name them in data.columns"),
        (("prompt", "chosen"), "data.columns: {completion: chosen} or data.columns: {messages: chosen}"),
        (("chosen", "score"), "data.columns: {messages: chosen} or data.columns: {text: chosen}"),
        (("input", "preferred_output", "non_preferred_output"), "`preferred_output` is one of two answers"),
    ],
)
def test_columns_that_leave_a_doubt_are_refused_with_the_way_out(columns, reason):
    with pytest.raises(BadRow) as caught:
        choose_layout(columns, "auto", {})
    assert reason in str(caught.value)


def test_a_form_that_is_demanded_ends_the_doubt():
    for form in ("messages", "prompt_completion"):
        assert choose_layout(("prompt", "completion", "messages"), form, {}).form == form
    row = {"question": "Q", "answer": "A", "context": "C"}
    assert choose_layout(row, "question_answer", {}).example(row).messages == turns("Q", "A")


@pytest.mark.parametrize(
    ("row", "named", "expected"),
    [
        ({"ask": "Q", "reply": "A"}, {"prompt": "ask", "completion": "reply"}, turns("Q", "A")),
        ({"prompt": "Q", "reply": "A"}, {"completion": "reply"}, turns("Q", "A")),
        ({"prompt": "old", "ask": "Q", "completion": "A"}, {"prompt": "ask"}, turns("Q", "A")),
        ({"prompt": "A", "completion": "Q"}, {"prompt": "completion", "completion": "prompt"}, turns("Q", "A")),
        ({"q": "Q", "context": "C", "answer": "A"},
         {"instruction": "q", "input": "context", "output": "answer"}, turns("Q\n\nC", "A")),
        ({"chat": list(turns("Q", "A")), "messages": None}, {"messages": "chat"}, turns("Q", "A")),
        ({"system_prompt": "S", "question": "Q", "response": "A"},
         {"system": "system_prompt", "answer": "response"}, turns("Q", "A", system="S")),
    ],
)  # fmt: skip
def test_columns_are_taken_under_the_names_that_are_given(row, named, expected):
    assert example(row, **named).messages == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"columns": {"promt": "ask"}}, "data.columns: promt is no column of any form; allowed are messages,"),
        ({"columns": {"text": "ask"}, "form": "messages"}, "text is no column of the form messages; allowed are"),
        ({"columns": {"prompt": "ask", "answer": "reply"}}, "prompt, answer are not columns of one form"),
        ({"columns": {"prompt": "ask", "completion": "ask"}}, "`ask` is named twice"),
        ({"columns": {"prompt": "asked", "completion": "reply"}}, "prompt is `asked`, which is not there; columns"),
        ({"columns": {"prompt": "reply"}}, "no known form: columns found are ask, reply"),
        ({"subset": "main"}, "data.subset 'main': is for data sets on the Hub; remove it"),
        ({"split": "train[:1]"}, "data.split 'train[:1]': is for data sets on the Hub; remove it"),
        ({"revision": "v1"}, "data.revision 'v1': is for data sets on the Hub; remove it"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused_before_any_work(tmp_path, options, reason):
    (tmp_path / "data.jsonl").write_text('{"ask": "Q", "reply": "A"}\n{"ask": "R", "reply": "A"}')
    for refuse in (check_source, load_examples):
        with pytest.raises(DataError) as caught:
            refuse(Data(source=str(tmp_path / "data.jsonl"), **options))
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_an_optional_column_under_a_wrong_name_is_found_out_when_no_row_has_it(tmp_path):
    rows = [{"instruction": f"I{i}", "output": "O", **({"extra": "E"} if i else {})} for i in range(4)]
    content = "\n".join(map(json.dumps, rows))
    data = load(tmp_path, content, columns={"input": "extra"})
    assert sum("\n\nE" in e.prompt().replace("\\n", "\n") for e in data.train + data.held_out) == 3
    with pytest.raises(DataError, match="data.columns: input is `extr`, which no row has"):
        load(tmp_path, content, columns={"input": "extr"})


def test_errors_use_the_column_names_of_the_data(tmp_path):
    rows = '{"ask": "Q", "reply": "A"}\n{"ask": "R", "reply": null}\n{"ask": "S"}'
    columns = {"prompt": "ask", "completion": "reply"}
    with pytest.raises(DataError, match="line 2: `reply` is the value null"):
        load(tmp_path, rows, columns=columns)
    skipped = load(tmp_path, rows + '\n{"ask": "T", "reply": "B"}', columns=columns, on_bad_row="skip").skipped
    assert skipped.first[1] == ("line 3", "no `reply`; every row needs ask and reply")
    with pytest.raises(DataError, match="line 1: message 1 of `conversations` has no `value`"):
        load(tmp_path, '{"conversations": [{"from": "human"}]}')


def test_unused_columns_are_reported(tmp_path):
    rows = "\n".join(json.dumps({"id": i, "prompt": f"p{i}", "completion": "c", "score": 1}) for i in range(3))
    assert load(tmp_path, rows).unused == ("id", "score")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["data.jsonl", "data.json"])
def test_optional_columns_are_taken_from_all_rows(tmp_path, order, kind):
    rows = [{"instruction": f"I{i}", "response": "A"} for i in range(1500)]
    rows.append({"instruction": "I", "context": "C", "response": "A", "late": 1})
    content = json.dumps(rows[::order]) if kind == "data.json" else "\n".join(map(json.dumps, rows[::order]))
    data = load(tmp_path, content, kind)
    assert [e.messages for e in data.train + data.held_out if "C" in e.prompt()] == [turns("I\n\nC", "A")]
    assert data.unused == ("late",)


def test_needed_columns_are_those_of_the_first_row(tmp_path):
    rows = [{"instruction": "I", "response": "A"}, {"instruction": "J", "response": "B", "output": "stdout"}]
    data = load(tmp_path, "\n".join(map(json.dumps, rows)))
    assert sorted(e.learned()[0] for e in data.train + data.held_out) == ["A", "B"] and data.unused == ("output",)


def test_keys_of_messages_that_are_not_read_are_named(tmp_path):
    question, reply = {"role": "user", "id": 7, "name": "ada", "weight": 0}, {"role": "assistant", "content": "A"}
    rows = [{"messages": [question | {"content": f"Q{i}"}, reply | {"id": None, "lang": "en"}]} for i in range(3)]
    assert load(tmp_path, "\n".join(map(json.dumps, rows))).unused == ("messages.id", "messages.lang")
