"""Vocabularies: llama.cpp and transformers give the same token ids."""

import json
import shutil
import unicodedata
from pydoc_data.topics import topics

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError
from pipeline.quantization.formats.gguf.format import FORMAT as GGUF
from pipeline.quantization.formats.gguf.vocabulary import vocabulary
from tests.support.models import CHAT_TEMPLATE, GEMMA_TEMPLATE

SIZE = 640
SPEC = VariantSpec(name="gguf-f16")
TEXTS = [
    "Hello world", " two  spaces   here ", "line\n\nlines\n  indented\n", "tabs\tand\r\nreturns", "x = 1234567 + 89",
    "3.14159, 1,000,000", "I'm we'll THEY'RE don't O'Neil", "snake_case camelCase SHOUT", "naïve café, über",
    "Привет, мир", "こんにちは世界", "مرحبا", "🙂🚀 emoji", "a", "\n", "  ", "def f(x):\n    return x ** 2\n",
    "<html><body>no token</body></html>", "!!! ??? ...", "end of text. ", "The capital of France is Paris.", "№ ½ ² Ⅷ",
    "an own_word here", "own_wordown_word", "own_word",
]  # fmt: skip
CHATS = [
    [{"role": "user", "content": text.strip() or "-"}] for text in TEXTS[:10]
] + [
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}, {"role": "user", "content": t}]
    for t in ("Three?", "Four\nlines\n", "5 + 6 = 11")
]  # fmt: skip
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace("{1,3}", "")


def byte_level(regex=None, digits=False):
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    train(tokenizer, special, pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def sentencepiece(space_first=False):
    """Of Gemma's kind, or with a space before the text, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    changes = [normalizers.Prepend("▁")] if space_first else []
    tokenizer.normalizer = normalizers.Sequence([*changes, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only to learn words
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    train(tokenizer, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], [])
    about = json.loads(tokenizer.to_str())
    about["added_tokens"] = [token for token in about["added_tokens"] if token["content"] in special]
    about["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(about))
    first = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[first])
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tokenizer, named


def train(tokenizer, special, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 8, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:12]], trainer)


def with_whole_words(made):
    """The same with Llama 3's look for whole words first."""
    tokenizer, named = made
    about = json.loads(tokenizer.to_str())
    about["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(about)), named


KINDS = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(digits=True),
    "qwen2": lambda: byte_level(QWEN),
    "llama-bpe": lambda: with_whole_words(byte_level(LLAMA_3)),
    "smaug-bpe": lambda: byte_level(LLAMA_3),
    "gemma": sentencepiece,
    "llama-2": lambda: sentencepiece(space_first=True),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tiny_model, tmp_path_factory):
    """A tiny model with a tokenizer of a kind, and that tokenizer as transformers reads it back."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny_model("llama", vocab_size=SIZE, bos_token_id=None, eos_token_id=None), folder)
    write(folder, *KINDS[request.param]())
    return request.param, folder, AutoTokenizer.from_pretrained(folder)


def write(folder, tokenizer, named):
    for path in folder.glob("token*"):
        path.unlink()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if "Prepend" not in str(tokenizer.normalizer):
        fast.add_tokens(["own_word", "  "])
    fast.chat_template = GEMMA_TEMPLATE if "bos_token" in named else CHAT_TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def read(model, written, opened):
    return opened(written(model[1], "gguf-f16"), vocab_only=True)


def test_the_way_of_cutting_is_found(model):
    kind, _, tokenizer = model
    words = vocabulary(tokenizer, SIZE)
    assert (words.model, words.cut) == (("llama", "default") if kind in ("gemma", "llama-2") else ("gpt2", kind))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_texts_have_the_same_ids(model, read, text):
    _, _, tokenizer = model
    text = unicodedata.normalize("NFC", text)
    assert read.tokenize(text.encode(), add_bos=True, special=False) == tokenizer(text)["input_ids"]


def test_every_token_that_was_learned_is_the_same_token(model, read):
    _, _, tokenizer = model
    special = set(tokenizer.all_special_ids)
    for text, token in tokenizer.get_vocab().items():
        if token in special:
            assert read.tokenize(text.encode(), add_bos=False, special=True)[-1:] == [token]
    assert read.token_eos() == tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        assert read.token_bos() == tokenizer.bos_token_id


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: repr(chat[-1]["content"])[:20])
def test_chats_have_the_same_ids(model, read, chat):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    kind, _, tokenizer = model
    marks = {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token or ""}
    prompt = Jinja2ChatFormatter(read.metadata["tokenizer.chat_template"], **marks)(messages=chat).prompt
    assert prompt == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert read.tokenize(prompt.encode(), add_bos=False, special=True) == expected


def test_every_token_that_ends_an_answer_is_named(tiny_model, written, opened, tmp_path):
    folder = shutil.copytree(tiny_model("gemma3_text"), tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [259, 258]}))
    found = opened(written(folder, "gguf-f16"), vocab_only=True).metadata
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert int(found["tokenizer.ggml.eos_token_id"]) == tokenizer.eos_token_id == 259
    assert int(found["tokenizer.ggml.eot_token_id"]) == tokenizer.convert_tokens_to_ids("<end_of_turn>") == 258
    assert found["tokenizer.ggml.add_bos_token"] == "true"


def test_words_added_where_a_space_comes_first_are_refused_for_they_are_looked_for_with_it(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama", vocab_size=SIZE), tmp_path / "model")
    write(folder, *KINDS["llama-2"]())
    GGUF.check(SPEC, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["own_word"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="'own_word'"):
        GGUF.check(SPEC, folder)


def change(key, value):
    def apply(about):
        about[key] = value

    return apply


def with_flag(flag):
    def apply(about):
        about["added_tokens"][-1][flag] = True

    return apply


def test_a_tokenizer_that_composes_characters_is_taken(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    for normalizer in ({"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        about = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(about | {"normalizer": normalizer}))
        GGUF.check(SPEC, folder)


REFUSED = {
    "another pattern": (
        change("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}),
        "cuts text in a way",
    ),
    "words": (change("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "is WordLevel, not plain"),
    "a space before bytes": (
        change(
            "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ),
        "cuts text in a way",
    ),
    "lower case": (change("normalizer", {"type": "Lowercase"}), "changes text by Lowercase, which llama.cpp does not"),
    "compatible forms": (
        change("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}),
        "changes text by NFKC, which llama.cpp does not",
    ),
    **{flag: (with_flag(flag), rf"'<\|im_end\|>' with {flag}") for flag in ("single_word", "lstrip", "rstrip")},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(tiny_model, tmp_path, kind):
    folder, (apply, message) = shutil.copytree(tiny_model("llama"), tmp_path / "model"), REFUSED[kind]
    about = json.loads((folder / "tokenizer.json").read_text())
    apply(about)
    (folder / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match=message) as caught:
        GGUF.check(SPEC, folder)
    assert str(folder) in str(caught.value)
