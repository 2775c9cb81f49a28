"""Encoding: the loss is on answers and their ends, with any chat template."""

import pytest

from pipeline.data import Example
from pipeline.data.chat import ChatTemplate
from pipeline.data.encode import NO_LOSS, encode_examples, encode_text
from pipeline.data.supplied_template import is_supplied, supply_template
from pipeline.data.template_choice import choose_template
from pipeline.errors import DataError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|end|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Marks the content, but forgets the end of the turn.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
# Marks the end of the turn too, and the line feed behind it.
GENERATION_TO_THE_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# An empty thinking block before the last answer only, so that no rendering is a prefix of a longer one.
STRIPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}<think></think>{% endif %}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt has a thinking block that rendered answers do not have.
PROMPTS_THINKING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think></think>' }}{% endif")
# An empty thinking block in the prompt and before every answer that brings none of its own.
FILLS_THINKING = CHATML.replace(
    "m['content'] +",
    "('<think></think>' if m['role'] == 'assistant' and '<think>' not in m['content'] else '') + m['content'] +",
).replace("assistant\n' }}{% endif", "assistant\n<think></think>' }}{% endif")
# No header before an answer, content trimmed, roles that must alternate, no system message.
BRACKETS = (
    "{{ '<s>' }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}"
    "{% endfor %}"
)
# An end of text behind the whole conversation.
CLOSES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LAST_ONLY = "{% for m in messages[-2:] %}{{ '<|im_start|>' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def train_tokenizer():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["system user assistant think question answer: one two three.\n"] * 20, trainer)
    return model


MODEL = train_tokenizer().to_str()


def tokenizer(template, eos="<|im_end|>", adds_bos=False):
    model = tokenizers.Tokenizer.from_str(MODEL)
    if adds_bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
        )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token=eos)
    wrapped.chat_template = template
    return wrapped


def conversation(*contents, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return Example(tuple([{"role": "system", "content": system}] * bool(system) + messages))


def learned(template, example, loss_on="assistant", **options):
    """What the loss is taken on, decoded: one string for each run of tokens."""
    tok = tokenizer(template, **options)
    (sequence,) = encode_examples([example], tok, loss_on, 10_000).examples
    assert len(sequence.input_ids) == len(sequence.labels)
    runs, inside = [], False
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        assert label in (NO_LOSS, token)
        if label != NO_LOSS:
            runs = [*runs[:-1], [*runs[-1], label]] if inside else [*runs, [label]]
        inside = label != NO_LOSS
    return [tok.decode(run) for run in runs]


TWO_TURNS = conversation("Question one?", "Answer one.", "Question two?", "Answer two.")
BOTH = ["Answer one.<|im_end|>", "Answer two.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, GENERATION, GENERATION_TO_THE_END, PROMPTS_THINKING])
def test_every_answer_and_its_end_is_learned_and_nothing_else(template):
    assert learned(template, TWO_TURNS) == BOTH
    assert learned(template, TWO_TURNS, "auto") == BOTH
    assert learned(template, TWO_TURNS, "completion") == BOTH[1:]


@pytest.mark.parametrize("template", [CHATML, GENERATION, PROMPTS_THINKING, STRIPS_THINKING])
def test_a_system_message_is_not_learned(template):
    example = conversation("Question?", "Answer.", system="Be brief. Answer.")
    assert learned(template, example)[0].removeprefix("<think></think>") == "Answer.<|im_end|>"


def pair(better, worse, *before):
    example = conversation(*before, "Question?", better)
    return Example(example.messages, rejected={"role": "assistant", "content": worse})


@pytest.mark.parametrize(
    "template",
    [CHATML, GENERATION, GENERATION_TO_THE_END, STRIPS_THINKING, PROMPTS_THINKING, FILLS_THINKING, PLAIN, CLOSES],
)
@pytest.mark.parametrize("loss_on", ["auto", "all"])
def test_pair_is_two_sequences_with_one_prompt_and_all_behind_it_learned(template, loss_on):
    tok, example = tokenizer(template), pair("Answer two.", "Answer one, two.", "Question one?", "Answer one.")
    (found,) = encode_examples([example], tok, loss_on, 1000).examples
    alone = [encode_examples([one], tok, "completion", 1000).examples[0] for one in example.alternatives]
    for sequence, expected in zip(found.sequences, alone, strict=True):
        assert sequence.prompt_length == found.prompt_length
        learned_ids = sequence.input_ids[found.prompt_length :]
        assert sequence.labels == [NO_LOSS] * found.prompt_length + learned_ids
        assert sequence.input_ids == expected.input_ids[: len(sequence.input_ids)]
        assert learned_ids == [label for label in expected.labels if label != NO_LOSS]
    assert found.input_ids[: found.prompt_length] == found.rejected.input_ids[: found.prompt_length]


def test_pairs_without_a_difference_within_the_limit_are_counted_as_dropped():
    tok = tokenizer(CHATML)
    long = "one two three " * 20
    (whole,) = encode_examples([pair("A.", "B.")], tok, "auto", 1000).examples
    pairs = [pair("A.", "B."), pair(long + "A", long + "B"), pair("A.", "B.", long, long), pair(long, "B.")]
    limit = len(whole.input_ids) + 1  # with the line feed behind the end of turn
    found = encode_examples(pairs, tok, "auto", limit)
    assert (found.dropped, found.truncated, [e.cluster for e in found.examples]) == (2, 1, [0, 3])
    assert max(len(s.input_ids) for e in found.examples for s in e.sequences) == limit
    assert found.tokens == sum(len(s.input_ids) for e in found.examples for s in e.sequences)


def test_loss_on_all_covers_every_token_but_the_first():
    tok = tokenizer(CHATML)
    (sequence,) = encode_examples([TWO_TURNS], tok, "all", 1000).examples
    assert sequence.labels == [NO_LOSS, *sequence.input_ids[1:]]
    assert tok.decode(sequence.input_ids) == tok.apply_chat_template(list(TWO_TURNS.messages), tokenize=False)


def test_a_template_that_strips_the_thinking_of_earlier_turns_is_marked_as_it_renders():
    example = conversation("Q one?", "<think>Hmm.</think>Answer one.", "Q two?", "<think>Well.</think>Answer two.")
    assert learned(STRIPS_THINKING, example) == ["Answer one.<|im_end|>", "<think>Well.</think>Answer two.<|im_end|>"]


def test_text_after_the_generation_prompt_is_learned():
    assert learned(STRIPS_THINKING, TWO_TURNS) == [BOTH[0], "<think></think>" + BOTH[1]]


def test_thinking_in_place_of_an_empty_block_is_learned():
    example = conversation("Q one?", "Answer one.", "Q two?", "<think>Well.</think>Answer two.")
    first, second = learned(FILLS_THINKING, example)
    assert first == BOTH[0] and second.endswith("Well.</think>Answer two.<|im_end|>") and "assistant" not in second


def test_a_template_that_leaves_out_earlier_turns_is_marked_where_it_shows_an_answer():
    assert learned(LAST_ONLY, TWO_TURNS) == BOTH[1:]


def test_a_template_without_a_header_for_answers_is_marked_at_their_content():
    example = conversation("Question one?", " Answer one. ", "Question two?", "Answer two.\n")
    assert [s.strip() for s in learned(BRACKETS, example, eos="</s>")] == ["Answer one. </s>", "Answer two. </s>"]


def test_an_end_of_text_behind_the_last_answer_does_not_hide_the_ends_of_the_others():
    assert learned(CLOSES, TWO_TURNS, eos="</s>") == ["Answer one.<|end|>", "Answer two.<|end|>\n</s>"]


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_an_answer_that_nothing_ends_is_ended_by_the_end_of_text(loss_on):
    assert learned(PLAIN, conversation("Question?", "Answer."), loss_on)[0].endswith("Answer.<|im_end|>")


def test_an_answer_is_found_among_repetitions_of_itself():
    example = conversation("yes", "yes", "yes", "yes", system="yes")
    assert learned(CHATML, example) == ["yes<|im_end|>"] * 2


@pytest.mark.parametrize(
    "answer", ["  indented\n\n    code", "\n\nlines\n", "Ünïcödé \N{PILE OF POO}!", "tunepressprobe", "user\n", ">"]
)
def test_answers_of_every_shape_are_learned_whole(answer):
    assert learned(CHATML, conversation(answer, answer)) == [answer + "<|im_end|>"]


def test_text_after_the_last_answer_is_dropped():
    example = conversation("Question?", "Answer.", "Thanks!")
    tok = tokenizer(CHATML)
    (sequence,) = encode_examples([example], tok, "assistant", 1000).examples
    assert "Thanks" not in tok.decode(sequence.input_ids)
    assert learned(CHATML, example) == ["Answer.<|im_end|>"]


def test_truncation_is_on_the_right_and_counted():
    short, long = conversation("Q", "A"), conversation("Q", "A " * 200)
    without_answer = conversation("Q " * 200, "A")
    result = encode_examples([short, long, without_answer], tokenizer(CHATML), "assistant", 50)
    assert (len(result.examples), result.truncated, result.dropped) == (2, 1, 1)
    assert len(result.examples[1].input_ids) == 50 and result.examples[1].labels[-1] != NO_LOSS
    assert result.tokens == 50 + len(result.examples[0].input_ids)
    assert result.loss_tokens == sum(label != NO_LOSS for e in result.examples for label in e.labels)


def test_progress_reaches_the_number_of_examples():
    seen = []
    encode_examples([TWO_TURNS] * 600, tokenizer(CHATML), "auto", 100, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (600, 600) and len(seen) > 2 and seen == sorted(seen)


def test_order_is_kept():
    examples = [conversation(f"Q{i}", f"A{i}") for i in range(300)]
    tok = tokenizer(CHATML)
    for i, sequence in enumerate(encode_examples(examples, tok, "assistant", 100).examples):
        assert tok.decode([label for label in sequence.labels if label != NO_LOSS]) == f"A{i}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template; choose an instruct model"),
        (BRACKETS, "refuses the conversation that begins 'Be kind.': Roles must alternate"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "does not take plain text"),
        (
            "{{ messages | map(attribute='content') | join('|') | length }}"
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "loss_on: all",
        ),
    ],
)
def test_unusable_template_gives_one_line(template, reason):
    tok = tokenizer(template)
    tok.name_or_path = "user/model"
    with pytest.raises(DataError) as caught:
        encode_examples([conversation("Q", "Answer", system="Be kind.")], tok, "assistant", 100)
    message = str(caught.value)
    assert message.startswith("user/model: ") and reason in message and "\n" not in message


def test_loss_on_all_works_if_answers_cannot_be_located():
    template = "{{ messages | map(attribute='content') | join('|') | length }}{{ messages[-1]['content'] }}"
    assert encode_examples([conversation("Q", "Answer")], tokenizer(template), "all", 100).loss_tokens > 0


TEXT = "one two three. question answer: " * 40


def test_windows_cover_the_text_in_order_and_count_all_tokens_but_their_first():
    tok = tokenizer(None)
    ids = tok(TEXT)["input_ids"]
    windows = encode_text(TEXT, tok, 64, 10_000)
    joined = [token for w in windows for token in w.input_ids]
    assert joined == ids[: len(joined)] and 0 <= len(ids) - len(joined) < 32
    assert all(len(w.input_ids) == 64 for w in windows[:-1])
    assert all(w.labels == [NO_LOSS, *w.input_ids[1:]] for w in windows)


def test_windows_begin_as_the_tokenizer_begins_a_text():
    tok = tokenizer(None, adds_bos=True)
    windows = encode_text(TEXT, tok, 64, 10_000)
    assert all(w.input_ids[0] == tok.bos_token_id and tok.bos_token_id not in w.input_ids[1:] for w in windows)
    joined = [token for w in windows for token in w.input_ids[1:]]
    assert joined == tok(TEXT)["input_ids"][1:][: len(joined)] and len(windows[0].input_ids) == 64


@pytest.mark.parametrize(
    ("max_tokens", "lengths"), [(128, [64, 64]), (127, [64, 63]), (100, [64, 36]), (95, [64]), (40, [40])]
)
def test_no_more_tokens_than_asked_for_and_no_window_shorter_than_32(max_tokens, lengths):
    assert [len(w.input_ids) for w in encode_text(TEXT, tokenizer(None), 64, max_tokens)] == lengths


def test_a_text_too_short_to_measure_on_is_refused():
    with pytest.raises(DataError, match="at least 32 are needed"):
        encode_text("one two", tokenizer(None), 64, 1000)


def texts(*lengths):
    return [Example(text=("one two three. " * length)[: 5 * length] or "x") for length in lengths]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("loss_on", ["auto", "completion"])
def test_a_text_is_learned_whole_and_to_its_end(adds_bos, loss_on):
    tok = tokenizer(None, adds_bos=adds_bos)
    (sequence,) = encode_examples([Example(text=" Once.\n")], tok, loss_on, 100).examples
    assert sequence.labels == [NO_LOSS, *sequence.input_ids[1:]]
    assert tok.decode(sequence.input_ids) == "<s>" * adds_bos + " Once.\n<|im_end|>"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("length", [1, 30, 63, 64, 65, 70, 100, 127, 128, 129, 200, 500])
def test_long_text_is_cut_into_windows_without_loss(adds_bos, length):
    tok = tokenizer(None, adds_bos=adds_bos)
    (example,) = texts(length)
    ids = tok(example.text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
    result = encode_examples([example], tok, "auto", 64)
    parts = [e.input_ids[adds_bos:] for e in result.examples]
    assert [token for part in parts for token in part] == ids
    assert all(len(e.input_ids) <= 64 and e.labels == [NO_LOSS, *e.input_ids[1:]] for e in result.examples)
    assert all(e.input_ids[0] == tok.bos_token_id for e in result.examples) or not adds_bos
    assert len(parts) == 1 or min(map(len, parts)) >= 31  # no window that says nothing
    assert (result.cut, result.truncated, result.dropped) == (int(len(ids) > 64 - adds_bos), 0, 0)


def test_cut_texts_are_counted_once_each_and_order_is_kept():
    tok = tokenizer(None)
    seen = []
    result = encode_examples(texts(500, 3, 400, 0), tok, "auto", 64, lambda d, t: seen.append((d, t)))
    assert result.cut == 2 and len(result.examples) > 8 and seen == [(4, 4)]
    assert tok.decode(result.examples[-1].input_ids) == "x<|im_end|>"
    assert result.tokens == sum(len(e.input_ids) for e in result.examples)
    assert result.loss_tokens == result.tokens - len(result.examples)


def test_a_window_of_one_token_teaches_nothing_and_the_text_is_counted_as_dropped():
    result = encode_examples(texts(5), tokenizer(None), "auto", 1)
    assert (result.examples, result.dropped) == ([], 1)


def supplied(adds_bos=False, eos="</s>"):
    tok = tokenizer(None, eos=eos, adds_bos=adds_bos)
    vocabulary = len(tok)
    assert supply_template(tok) and len(tok) == vocabulary
    return tok


def test_a_template_is_supplied_only_where_there_is_none():
    tok = tokenizer(CHATML)
    assert not supply_template(tok) and tok.chat_template == CHATML and not is_supplied(tok)
    tok = supplied()
    assert is_supplied(tok) and not supply_template(tok)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_supplied_template_marks_turns_in_plain_text_and_ends_answers(adds_bos):
    tok = supplied(adds_bos)
    example = conversation("Question one?", "Answer one.", "Question two?", "Answer two.", system="Be brief.")
    (sequence,) = encode_examples([example], tok, "auto", 1000).examples
    assert tok.decode(sequence.input_ids) == "<s>" * adds_bos + (
        "### System:\nBe brief.\n\n### User:\nQuestion one?\n\n### Assistant:\nAnswer one.</s>\n\n"
        "### User:\nQuestion two?\n\n### Assistant:\nAnswer two.</s>"
    )


@pytest.mark.parametrize("answer", ["Answer.", "\n  indented\n", "### User:\nWho?", "Ünïcödé \N{PILE OF POO}", "</s>"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_answers_are_found_in_the_supplied_template(answer, system):
    example = conversation("Question one?", answer, "Question two?", answer, system=system)
    (sequence,) = encode_examples([example], tok := supplied(), "auto", 1000).examples
    marked = tok.decode([label for label in sequence.labels if label != NO_LOSS])
    assert marked == f"{answer}</s>" * 2


def test_inference_prompt_is_a_prefix_of_the_training_conversation():
    tok, messages = supplied(adds_bos=True), list(TWO_TURNS.messages)
    whole = tok.apply_chat_template(messages, tokenize=False)
    whole_ids = tok.apply_chat_template(messages)["input_ids"]
    for end in (1, 3):
        prompt = tok.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True)
        assert whole.startswith(prompt) and prompt.endswith("### Assistant:\n")
        ids = tok.apply_chat_template(messages[:end], add_generation_prompt=True)["input_ids"]
        assert whole_ids[: len(ids)] == ids
    assert ChatTemplate(tok).ends_turns


def test_a_saved_tokenizer_brings_the_supplied_template_back(tmp_path):
    supplied(adds_bos=True).save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert is_supplied(loaded) and not supply_template(loaded)


def test_no_template_is_supplied_where_a_model_could_not_learn_to_stop():
    tok = tokenizer(None, eos=None)
    tok.name_or_path = "user/model"
    with pytest.raises(DataError, match="^user/model: neither a chat template nor an end-of-text token"):
        supply_template(tok)


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        (GENERATION, "<|im_end|>"),
        (STRIPS_THINKING, "<|im_end|>"),
        (BRACKETS, "</s>"),
        (CLOSES, "<|end|>"),
        (PLAIN, "<s>"),  # the end of text, which is put behind what has no end
        (PLAIN.replace("+ '\n' }}{% endfor %}", "+ '\n###\n' }}{% endfor %}"), None),
    ],
)
def test_end_of_turn_is_the_token_that_training_puts_after_an_answer(template, end):
    known = tokenizer(template, eos="<s>")
    assert ChatTemplate(known).end_of_turn() == (end and known.convert_tokens_to_ids(end))


SEVERAL = {"chat": CHATML, "tool_use": BRACKETS}


def test_several_templates_without_a_default_need_a_choice():
    known = tokenizer(SEVERAL)
    with pytest.raises(DataError, match=r"several chat templates \(chat, tool_use\), .* Try: data.chat_template=chat"):
        choose_template(known, None)
    with pytest.raises(DataError, match="none is the default"):
        ChatTemplate(known)
    assert choose_template(tokenizer({**SEVERAL, "default": PLAIN}), None) is None


def test_template_is_chosen_by_its_name_or_from_a_file(tmp_path):
    known = tokenizer(SEVERAL)
    assert choose_template(known, "tool_use") == BRACKETS == known.chat_template
    (tmp_path / "own.jinja").write_text(PLAIN)
    assert choose_template(known, str(tmp_path / "own.jinja")) == PLAIN == known.chat_template
    with pytest.raises(DataError, match="'plain': not a readable file.*; the model has chat, tool_use"):
        choose_template(tokenizer(SEVERAL), "plain")
