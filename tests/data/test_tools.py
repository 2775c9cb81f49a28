"""Tools, reasoning and weights of messages: read from every shape of row, written by real templates, marked right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from pipeline.config.schema import Data
from pipeline.data import load_examples, read_examples, write_examples
from pipeline.data.chat import ChatTemplate, TemplateRefusal
from pipeline.data.encode import NO_LOSS, accepted_examples, encode_examples
from pipeline.data.layout import choose_layout
from pipeline.data.supplied_template import supply_template
from pipeline.errors import DataError
from tests.support.models import write_tokenizer

REAL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # those of the models' repositories

WEATHER = {
    "name": "weather",
    "description": "Get the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City."}}},
}
CALL = {"name": "weather", "arguments": {"city": "Köln"}}
TOOLS = ({"type": "function", "function": WEATHER},)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}], "content": ""},
    {"role": "tool", "content": '{"rain": 1}'},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Never mind."},
]


def example(row):
    return choose_layout(row, "auto", {}).example(row)


def changed(messages, at, **keys):
    return [message | keys if i == at else dict(message) for i, message in enumerate(messages)]


def part(text):
    return {"type": "text", "text": text}


def shared(role, value):
    return {"from": role, "value": value}


SHARE_GPT = [
    shared("system", "Be brief."), shared("human", "Rain?"), shared("function_call", json.dumps(CALL)),
    shared("observation", '{"rain": 1}'), shared("gpt", "It rains."), shared("human", "Thanks."),
    shared("gpt", "Never mind."),
]  # fmt: skip
AS_TEXT = {"name": "weather", "arguments": json.dumps(CALL["arguments"])}
TWICE = json.dumps(AS_TEXT["arguments"])
SHAPES = {
    "as chat templates take it": {"messages": CONVERSATION, "tools": [*TOOLS]},
    "bare tools and calls": {"messages": changed(CONVERSATION, 2, tool_calls=[CALL]), "tools": [WEATHER]},
    "arguments as text, no content": {
        "messages": changed(CONVERSATION, 2, tool_calls=[{"type": "function", "function": AS_TEXT}], content=None),
        "tools": json.dumps(TOOLS),
    },
    "OpenAI's old names": {
        "messages": changed(changed(CONVERSATION, 2, tool_calls=None, function_call=AS_TEXT), 3, role="function"),
        "functions": [WEATHER],
    },
    "developer, parts, weights": {
        "messages": changed(
            changed(changed(CONVERSATION, 0, role="developer"), 4, weight=1, content=[part("It rains.")]),
            6, train=True, content=[part("Never "), part("mind.")],
        ),
        "tools": [*TOOLS],
    },
    "LLaMA-Factory's parts": {
        "messages": [
            {"role": m["role"], "content": [{"type": "text", "value": m["content"]}], "loss_weight": 1.0}
            for m in changed(CONVERSATION, 2)
        ],
        "tools": json.dumps(TOOLS),
    },
    "JSON in JSON": {
        "messages": changed(CONVERSATION, 2, tool_calls=json.dumps([CALL | {"arguments": TWICE}])),
        "tools": [json.dumps(WEATHER)],
    },
    "ShareGPT": {"conversations": SHARE_GPT, "tools": json.dumps([WEATHER])},
    "ShareGPT with the system message beside": {
        "conversations": SHARE_GPT[1:], "system": "Be brief.", "tools": [WEATHER],
    },
}  # fmt: skip
SHAPES["LLaMA-Factory's parts"]["messages"][2]["content"] = [{"type": "tool_call", "value": json.dumps(CALL)}]


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_tools_becomes_the_same_example(row):
    found = example(row)
    assert (list(found.messages), found.tools) == (CONVERSATION, TOOLS)
    assert found.canonical() == example(SHAPES["as chat templates take it"]).canonical()
    assert found.learned()[0] == '{"arguments":{"city":"Köln"},"name":"weather"}'


def test_parts_of_reasoning_become_the_reasoning_of_the_answer():
    parts = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Four."}]
    found = example(
        {"messages": [{"role": "user", "content": [part("2+2?")]}, {"role": "assistant", "content": parts}]}
    )
    assert found.messages[1] == {"role": "assistant", "content": "Four.", "reasoning_content": "Hm."}


def test_nulls_that_arrow_fills_in_are_no_arguments(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = changed(CONVERSATION, 1, content="What time is it?")
    other = changed(other, 2, tool_calls=[{"name": "time", "arguments": {"zone": "UTC"}}])
    rows = [{"messages": [*CONVERSATION], "tools": [*TOOLS]}, {"messages": other, "tools": [WEATHER]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = load_examples(Data(source=str(tmp_path / "a.parquet")))
    expected = {example(row).canonical() for row in rows}
    assert {e.canonical() for e in data.train + data.held_out} == expected


def test_tools_reasoning_and_weights_survive_a_file(tmp_path):
    messages = changed(changed(CONVERSATION, 4, weight=0), 6, thinking="Polite.")
    messages[2]["tool_calls"] = [CALL | {"id": "call_1"}]
    messages[3] |= {"name": "weather", "tool_call_id": "call_1"}
    examples = (
        example({"messages": messages, "tools": [*TOOLS]}),
        example({"messages": CONVERSATION[:2] + CONVERSATION[4:]}),
    )
    write_examples(tmp_path / "x.jsonl", examples)
    assert [e.canonical() for e in read_examples(tmp_path / "x.jsonl")] == [e.canonical() for e in examples]
    assert examples[0].messages[6]["reasoning_content"] == "Polite." and examples[0].messages[4]["weight"] == 0
    assert examples[0].messages[2]["tool_calls"][0]["id"] == "call_1" and examples[0].messages[3]["tool_call_id"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def learned(tokenizer, template, found, loss_on="auto"):
    """Return the runs of text that the loss is taken on, and the whole text."""
    tokenizer.chat_template = template
    (encoded,) = encode_examples([found], tokenizer, loss_on, 10_000).examples
    runs, inside = [], False
    for token in encoded.labels:
        if token != NO_LOSS:
            runs = [*runs[:-1], [*runs[-1], token]] if inside else [*runs, [token]]
        inside = token != NO_LOSS
    return [tokenizer.decode(run).strip() for run in runs], tokenizer.decode(encoded.input_ids)


IN_JSON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>'
IN_XML = "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call><|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"
WRITTEN = {
    "qwen2_5": [IN_JSON, "It rains.<|im_end|>", "Never mind.<|im_end|>"],
    "qwen3": [IN_JSON, "It rains.<|im_end|>", f"{EMPTY}Never mind.<|im_end|>"],
    "qwen3_training": [f"{EMPTY}{IN_JSON}", f"{EMPTY}It rains.<|im_end|>", f"{EMPTY}Never mind.<|im_end|>"],
    "qwen3_5_nothink": [IN_XML, "It rains.<|im_end|>", "Never mind.<|im_end|>"],
    "llama3_1": [
        '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>', "It rains.<|eot_id|>", "Never mind.<|eot_id|>",
    ],
    "gptoss": [
        'to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>',
        "<|channel|>final<|message|>It rains.", "<|channel|>final<|message|>Never mind.<|return|>",
    ],
    "gemma4_v5": [
        '<|tool_call>call:weather{city:<|"|>Köln<|"|>}<tool_call|><|tool_response>', "It rains.<turn|>",
        "Never mind.<turn|>",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("template", "expected"), WRITTEN.items(), ids=WRITTEN)
def test_calls_are_written_by_the_template_and_learned_with_the_answers_alone(tokenizer, template, expected):
    found = example(SHAPES["arguments as text, no content"])
    runs, text = learned(tokenizer, (REAL / f"{template}.jinja").read_text(), found)
    assert runs == expected
    assert "Get the weather." in text and "rain" in text and "Be brief." in text


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "gemma4_v5", "qwen3_training"])
def test_a_call_may_be_the_last_answer(tokenizer, template):
    found = example({"messages": CONVERSATION[:4], "tools": [*TOOLS]})
    (run,), text = learned(tokenizer, (REAL / f"{template}.jinja").read_text(), found)
    assert "weather" in run and "Köln" in run and "Rain?" not in run and '{"rain": 1}' not in text


@pytest.mark.parametrize(
    ("template", "call"),
    [("gptoss", WRITTEN["gptoss"][0]), ("qwen3", IN_JSON), ("qwen3_5_nothink", IN_XML)],
)
def test_a_call_in_the_middle_is_found_without_its_reasoning(tokenizer, template, call):
    messages = changed(changed(CONVERSATION, 2, thinking="Look it up."), 6, thinking="Be polite.")
    runs, text = learned(tokenizer, (REAL / f"{template}.jinja").read_text(), example({"messages": messages}))
    assert (runs[0], runs[1]) == (call, WRITTEN[template][1]) and "Be polite." in runs[2]
    assert "Look it up." not in text  # templates keep the reasoning of the last turn alone


def test_arguments_are_text_if_the_template_joins_them(tokenizer):
    found = example({"messages": CONVERSATION})
    runs, _ = learned(tokenizer, (REAL / "deepseekv3.jinja").read_text(), found)
    assert '\n{"city": "Köln"}\n' in runs[0]


@pytest.mark.parametrize(
    ("template", "row", "part"),
    [
        ("llama3", {"messages": CONVERSATION, "tools": [*TOOLS]}, "tools"),
        ("llama3", {"messages": CONVERSATION}, "calls of tools"),
        ("deepseekv3", {"messages": CONVERSATION, "tools": [*TOOLS]}, "tools"),
        ("phi3", {"messages": [*CONVERSATION[:2], CONVERSATION[3], CONVERSATION[4]]}, "what tools answered"),
        ("qwen2_5", {"messages": changed(CONVERSATION, 6, thinking="Hm.")}, "reasoning"),
        ("llama3_1", {"messages": changed(CONVERSATION, 2, content="One moment.")}, "the text beside calls of tools"),
        ("supplied", {"messages": CONVERSATION, "tools": [*TOOLS]}, "tools"),
    ],
)
def test_a_template_that_leaves_out_a_part_is_refused_in_one_line(tokenizer, template, row, part):
    tokenizer.chat_template = None if template == "supplied" else (REAL / f"{template}.jinja").read_text()
    supply_template(tokenizer)
    with pytest.raises(TemplateRefusal) as caught:
        encode_examples([example(row)], tokenizer, "auto", 10_000)
    assert f"its chat template does not write {part}, which" in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_leaves_out_system_messages_is_refused(tokenizer):
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    without = CONVERSATION[5:]
    assert learned(tokenizer, template, example({"messages": without}))[0] == ["Never mind.<|im_end|>"]
    with pytest.raises(DataError, match="does not write system messages"):
        learned(tokenizer, template, example({"messages": [CONVERSATION[0], *without]}))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("qwen3", "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"),
        ("qwen3_training", "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"),
        ("qwen3_5_nothink", "Two and two.\n</think>\n\nFour.<|im_end|>"),
        ("gptoss", "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>Four."
                   "<|return|>"),
    ],
)  # fmt: skip
def test_reasoning_is_learned_with_its_answer(tokenizer, template, key, expected):
    row = {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "Four.", key: "Two and two."},
        ]
    }
    assert learned(tokenizer, (REAL / f"{template}.jinja").read_text(), example(row))[0] == [expected]


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training", "loss"])
@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_training", "llama3_1"])
def test_an_answer_of_weight_0_is_read_and_not_learned(tokenizer, template, key):
    template = (REAL / f"{template}.jinja").read_text()
    runs, text = learned(tokenizer, template, example({"messages": CONVERSATION, "tools": [*TOOLS]}))
    for at in (2, 4, 6):
        found = example({"messages": changed(CONVERSATION, at, **{key: 0}), "tools": [*TOOLS]})
        kept, shown = learned(tokenizer, template, found)
        assert kept == [run for i, run in zip((2, 4, 6), runs, strict=True) if i != at]
        assert shown == text or at == 6  # behind the last learned answer nothing is read
    one = example({"messages": changed(CONVERSATION, 4, **{key: 1}), "tools": [*TOOLS]})
    assert learned(tokenizer, template, one)[0] == runs


def test_an_answer_of_weight_0_is_not_learned_if_the_loss_is_on_all(tokenizer):
    found = example({"messages": changed(CONVERSATION, 4, weight=0), "tools": [*TOOLS]})
    template = (REAL / "qwen2_5.jinja").read_text()
    runs, text = learned(tokenizer, template, found, "all")
    assert len(runs) == 2 and "It rains." in text and all("It rains." not in run for run in runs)
    assert "Rain?" in runs[0] and "Thanks." in runs[1]
    completion = example({"messages": changed(CONVERSATION, 6, weight=0), "tools": [*TOOLS]})
    assert learned(tokenizer, (REAL / "qwen2_5.jinja").read_text(), completion, "completion")[0] == [
        "It rains.<|im_end|>"
    ]


def test_weights_do_not_change_what_an_answer_is_a_reply_to():
    plain, weighted = (example({"messages": changed(CONVERSATION, 4, weight=w)}) for w in (1, 0))
    assert plain.canonical() != weighted.canonical()
    assert plain.prompts("completion") == weighted.prompts("completion")
    assert plain.learned_in_context()[-1] == weighted.learned_in_context()[-1]
    assert len(plain.answers()) == 3 and weighted.answers() == [2, 6]


def test_a_template_that_merges_answers_cannot_leave_one_out(tokenizer):
    template = "{% generation %}{% for m in messages %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% endgeneration %}"
    tokenizer.chat_template = template
    found = example({"messages": changed(CONVERSATION[4:], 0, weight=0)})
    with pytest.raises(DataError, match="does not tell answers from the rest"):
        encode_examples([found], tokenizer, "auto", 1000)
    assert ChatTemplate(tokenizer).answers(CONVERSATION[4:], ChatTemplate(tokenizer).render(CONVERSATION[4:]))


def test_examples_that_a_template_refuses_can_be_left_out(tokenizer):
    tokenizer.chat_template = (REAL / "gemma3.jinja").read_text()
    good = example({"messages": CONVERSATION[5:]})
    twice = example({"messages": [CONVERSATION[1], *CONVERSATION[5:]]})
    text = example({"text": "T"})
    assert accepted_examples([twice, good, example({"messages": CONVERSATION})], tokenizer) == (good,)
    assert accepted_examples([text], tokenizer) == (text,) and accepted_examples([], tokenizer) == ()
