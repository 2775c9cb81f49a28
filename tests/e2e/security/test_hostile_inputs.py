"""Files and answers from anywhere: each is taken for what it says, or refused in one line; nothing else comes of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest

from pipeline.config.schema import Data, Model
from tests.support.audit_watch import HUB_TOKEN, TOKEN, WRITE_TOKEN, watching


class Owned:
    def __reduce__(self):
        return os.system, ("touch owned",)


PICKLE = pickle.dumps(Owned())
DEEP = b"[" * 200_000
_LETTERS = "abcdefghi"
BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}]\n" for p, n in zip(_LETTERS, _LETTERS[1:], strict=False)
)
ESCAPES = "\x1b]0;owned\x07\x1b[2J"

# Data files: what stands in them, by name.
DATA = {
    "deep.jsonl": DEEP,
    "escapes.jsonl": json.dumps({"prompt": ESCAPES, "completion": 7}).encode(),
    "escaped-column.jsonl": json.dumps({ESCAPES: "a", "reply": "b"}).encode(),
    "token.jsonl": json.dumps({"prompt": "a", "completion": [TOKEN, HUB_TOKEN]}).encode(),
    "token-as-column.jsonl": json.dumps({TOKEN: "a", WRITE_TOKEN: "b"}).encode(),
    "token-cut.jsonl": json.dumps({"prompt": "a", "completion": ["x" * 40, WRITE_TOKEN]}).encode(),
    "half-character.jsonl": b'{"prompt": "\\ud800", "completion": "b"}',
    "huge-number.jsonl": b'{"prompt": ' + b"9" * 6000 + b', "completion": "b"}',
    "infinite.jsonl": b'{"prompt": Infinity, "completion": NaN}',
    "twice.jsonl": b'{"prompt": "a", "prompt": 1, "completion": "b"}',
    "nul.jsonl": b"\x00" * 1000,
    "one-line.jsonl": b'{"prompt": "' + b"a" * 1_000_000,
    "role.jsonl": json.dumps({"messages": [{"role": ESCAPES, "content": "a"}]}).encode(),
    "nested.jsonl": json.dumps({"messages": [{"role": "user", "content": {"a": [1]}}]}).encode(),
    "array.json": b'{"prompt": "a"}]',
    "deep.json": DEEP,
    "pickle.json": PICKLE,
    "pickle.jsonl": PICKLE,
    "pickle.parquet": PICKLE,
    "pickle.csv": PICKLE,
    "pickle.pkl": PICKLE,
    "cut.parquet": b"PAR1" + b"\xff" * 64 + b"PAR1",
    "length.parquet": b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "formula.csv": b'prompt,completion\n"=cmd|\'/C calc\'!A0",\n',
    "quotes.csv": b'prompt,completion\n"a' + b"b" * 200_000,
    "nul.csv": b"prompt,completion\na\x00b,\n",
    "columns.csv": b"," * 50_000 + b"\n",
    "escapes.tsv": f"prompt\tcompletion\n{ESCAPES}\t\n".encode(),
    "bytes.tsv": b"\xff\xfe\x00prompt",
    "packed.jsonl.gz": b"\x1f\x8b",
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_a_data_file(survives, place, name):
    from pipeline.data import load_examples

    (place / name).write_bytes(DATA[name])
    assert survives(lambda: load_examples(Data(source=name))) and not (place / "owned").exists()


NAMES = [
    "../up",
    "/etc",
    "/etc/passwd",
    "~root/x",
    "~nobody-here/x",
    "a" * 5000,
    "./" + "a/" * 3000,
    "user/..",
    "user/a/../../b",
    "C:\\x",
    "user/mo%2fdel",
    "user\\model",
    "-rf/x",
    "user/\u0430bc",
    "package:os/x.gguf",
    "package:pipeline.cli/x.gguf",
    "package:../x/y.gguf",
    "file:///etc/passwd",
    "https://ada@hub.org/x",
    "$(id)/x",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", ["model", "data", "adapter", "repository", "run", "loaded", "status", "accelerate"])
def test_a_name(survives, place, name, of):
    from pipeline.config.loader import parse_config
    from pipeline.data.sources import locate
    from pipeline.inference.load import locate as find_model
    from pipeline.models.sources import check_adapter, check_source
    from pipeline.training.accelerate_launch import read_launch
    from pipeline.workflow.workspace import Workspace

    tree = {"name": "tiny", "model": {"source": "user/model"}, "data": {"source": "x.jsonl"}}
    checks = {
        "model": lambda: check_source(Model(source=name)) if name.startswith(("package:", ".", "/", "~")) else None,
        "data": lambda: locate(name),
        "adapter": lambda: check_adapter(name),
        "repository": lambda: parse_config({**tree, "publish": {"repo": name}}, "x.yaml"),
        "run": lambda: parse_config({**tree, "name": name}, "x.yaml"),
        "loaded": lambda: find_model(name),
        "status": lambda: Workspace.open(name),
        "accelerate": lambda: read_launch(name),
    }
    if of == "model" and name.startswith("package:") and not name.endswith("os/x.gguf"):
        pytest.skip("is no source that a configuration takes")
    told = survives(checks[of])
    assert told or of in ("model", "data")


def header(content: object, tail: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tail


def tensor(shape, start=0, end=4, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHTS = {
    "pickle": PICKLE,
    "empty": b"",
    "short": b"\x00\x00",
    "length of everything": header({}, length=2**64 - 1),
    "length beyond the file": header({}, length=10_000),
    "deep": header(DEEP),
    "a list": header([1]),
    "no JSON": header(b"\xff\xff"),
    "twice": header(b'{"w": 1, "w": 2}'),
    "negative shape": header({"w": tensor([-1])}, b"1234"),
    "huge shape": header({"w": tensor([2**62, 2**62])}, b"1234"),
    "number of thousands of digits": header(b'{"w": {"dtype": "F32", "shape": [' + b"9" * 6000 + b']}}'),
    "float shape": header({"w": tensor([1.0])}, b"1234"),
    "text shape": header({"w": tensor("12")}, b"1234"),
    "no shape": header({"w": {"dtype": "F32"}}),
    "offsets beyond": header({"w": tensor([1], 10, 14)}, b"1234"),
    "offsets backwards": header({"w": tensor([1], 4, 0)}, b"1234"),
    "overlap": header({"v": tensor([1]), "w": tensor([1])}, b"1234"),
    "unknown type": header({"w": tensor([1], dtype="../F32")}, b"1234"),
    "type of no kind": header({"w": tensor([1], dtype=[])}, b"1234"),
    "metadata of no kind": header({"__metadata__": {"a": 1}}),
    "escapes": header({ESCAPES: tensor([2])}, b"1234"),
    "a token": header({TOKEN: tensor([2])}, b"1234"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_header_of_weights(survives, place, name):
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.planning.headers import safetensors_header

    (place / "model.safetensors").write_bytes(WEIGHTS[name])
    told = survives(lambda: Checkpoint(place))
    assert told and "model.safetensors" in told and not (place / "owned").exists()
    survives(lambda: safetensors_header("x", lambda start, stop: WEIGHTS[name][start:stop]))


INDEXES = [
    "../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "x.bin",
    "pytorch_model.bin",
    "..",
    "",
    "x.safetensors\x00",
    "~/x.safetensors",
    7,
    None,
    ["x"],
    "model-00001-of-99999.safetensors",
    "nowhere.safetensors",
]


@pytest.mark.parametrize("file", INDEXES, ids=repr)
def test_an_index_that_points_elsewhere(survives, place, file):
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.planning.model import _shards

    content = json.dumps({"weight_map": {"w": file}})
    (place / "model.safetensors.index.json").write_text(content)
    assert survives(lambda: Checkpoint(place))
    assert survives(lambda: _shards("user/model", {"model.safetensors.index.json": 1}, lambda name: content.encode()))


def gguf(*parts: bytes, fields: int = 1, tensors: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields) + b"".join(parts)


def field(kind: int, value: bytes, key: bytes = b"general.name") -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


ARRAY_OF_ARRAYS = struct.pack("<IQ", 9, 1) * 50_000
FILES_OF_LLAMA_CPP = {
    "pickle": PICKLE,
    "empty": b"",
    "version": b"GGUF" + b"\xff" * 40,
    "more fields than bytes": gguf(fields=2**64 - 1),
    "more tensors than bytes": gguf(fields=0, tensors=2**64 - 1),
    "endless key": gguf(struct.pack("<Q", 2**63)),
    "endless text": gguf(field(8, struct.pack("<Q", 2**62))),
    "endless array": gguf(field(9, struct.pack("<IQ", 4, 2**62))),
    "arrays in arrays": gguf(field(9, ARRAY_OF_ARRAYS)),
    "no such kind": gguf(field(99, b"")),
    "no such kind in an array": gguf(field(9, struct.pack("<IQ", 99, 5))),
    "no text": gguf(field(8, struct.pack("<Q", 3) + b"\xff\xfe\xfd")),
    "dimensions": gguf(struct.pack("<Q", 1) + b"w" + struct.pack("<I", 2**31), fields=0, tensors=1),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES_OF_LLAMA_CPP)
def test_a_file_for_llama_cpp(survives, place, name):
    from pipeline.models.gguf_metadata import read_dialogue, read_header

    path = place / "x.gguf"
    path.write_bytes(FILES_OF_LLAMA_CPP[name])
    told = survives(lambda: read_header(path))
    survives(lambda: read_dialogue(path))
    assert (told or name == "no text") and not (place / "owned").exists()


LINEAGES = [
    b"",
    DEEP,
    PICKLE,
    b"[]",
    b"7",
    b'{"schema": 1}',
    b'{"files": 7, "documents": 7}',
    b'{"files": {"../x": 1}, "documents": [["a"]], "run": {"a": 1}, "mirror_of": [1]}',
    b"9" * 6000,
    b'{"files": [{}], "documents": []}',
]


@pytest.mark.parametrize("content", LINEAGES, ids=range(len(LINEAGES)))
def test_a_lineage_in_a_repository(survives, content):
    from pipeline.hub.tree import Lineage
    from pipeline.verification.claims import Malformed, read_claims

    def read():
        found = Lineage.parse(content)
        assert found.run is None or isinstance(found.run, str)
        try:
            read_claims(content)
        except Malformed as error:
            assert str(error)

    survives(read)


CARDS = {
    "object": "!!python/object/apply:os.system ['touch owned']",
    "name": "!!python/name:os.system",
    "bomb": BOMB,
    "cycle": "a: &a [*a]",
    "deep": "a: " + "[" * 1000,
    "no number": "a: !!int x",
    "no number at all": "a: !!int ''",
    "no time": "a: !!timestamp x",
    "list as key": "? [a]\n: b",
    "half a character": 'a: "\\ud800"',
    "huge number": "a: 0x" + "f" * 6000,
    "ours of no kind": "tags: {a: b}\nlicense: [x]\nmodel-index: 7\nlanguage: {}",
    "an index of no kind": "model-index: [7, {results: 7}, {name: [x], results: [7, {source: 7}]}]",
    "twice": "license: a\nlicense: b",
    "escapes": f"license: '{ESCAPES}'",
}  # fmt: skip
OURS = "---\nlicense: mit\ntags:\n- int8\nmodel-index:\n- name: x\n  results: []\n---\n"


@pytest.mark.parametrize("name", CARDS)
def test_the_metadata_of_a_card(survives, place, name):
    from pipeline.models.provenance import read_origin
    from pipeline.publishing.cards.front_matter import merge, only

    survives(lambda: merge("license: mit\ntags: [int8]\n", CARDS[name]))
    survives(lambda: only(CARDS[name], ["license"]))
    (place / "README.md").write_bytes(f"---\n{CARDS[name]}\n---\n".encode("utf-8", "surrogatepass"))
    survives(lambda: read_origin(place, "x", "x"))
    assert not (place / "owned").exists()


@pytest.mark.parametrize(
    "text", ["", "---", "---\n---", "<!--" * 5000, "```" * 5000, ESCAPES, "\ufeff---\na: b\n---", TOKEN]
)
def test_the_text_of_a_card(survives, text):
    from pipeline.publishing.cards.own_text import keep_own_text, our_part, their_part

    def read():
        rendered = f"{OURS}<!-- tunepress:begin -->\nwords\n<!-- tunepress:end -->\n"
        for existing in (text, rendered + text, text + rendered, rendered.replace("end", "begin") + text):
            keep_own_text(rendered, existing)
            our_part(existing), their_part(existing)

    survives(read)


ADAPTERS = {
    "pickle": PICKLE,
    "deep": DEEP,
    "a list": b"[]",
    "another kind": b'{"peft_type": {"a": 1}}',
    "names of no kind": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": 7}',
    "a name of no kind": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": [7]}',
    "rank of no kind": b'{"peft_type": "LORA", "r": "2", "lora_alpha": 4}',
    "huge scale": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1' + b"0" * 400 + b"}",
    "endless scale": b'{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}',
    "no pattern": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"(": 2}}',
    "a module to import": b'{"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "megatron.x"}',
    "a start of its own": b'{"peft_type": "LORA", "init_lora_weights": ["loftq"]}',
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(survives, place, name):
    import torch
    from safetensors.torch import save_file

    from pipeline.models.lora_adapter import Adapter

    factors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.q.{part}.weight": t for part, t in factors.items()}, place / "adapter_model.safetensors"
    )
    (place / "adapter_config.json").write_bytes(ADAPTERS[name])
    assert survives(lambda: Adapter.read(place)) and not (place / "owned").exists()


def test_an_adapter_that_is_a_pickle(survives, place):
    from pipeline.models.sources import check_adapter

    (place / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (place / "adapter_model.bin").write_bytes(PICKLE)
    assert "has no adapter_model.safetensors" in survives(lambda: check_adapter(str(place)))


ANSWERS = [
    b"model: !!python/object/apply:os.system ['touch owned']",
    BOMB.encode(),
    DEEP,
    PICKLE,
    b"model: [*a]",
    b"? [a]\n: b",
    b"model: !!timestamp x",
    b"a: &a [*a]",
    b"model: x\nmodel: y",
    b"nonsense: x",
    b"\x00",
    b"7",
]


@pytest.mark.parametrize("content", ANSWERS, ids=range(len(ANSWERS)))
def test_answers_that_a_wizard_left(survives, place, content):
    from pipeline.cli.wizard.session import read_answers

    (place / "wizard-answers.yaml").write_bytes(content)
    assert survives(lambda: read_answers(place / "wizard-answers.yaml")) and not (place / "owned").exists()


LAUNCHES = [
    "!!python/object/apply:os.system ['touch owned']",
    "[" * 1000,
    "? [a]\n: b",
    "a: &a [*a]",
    "7",
    "{}",
    "\x00",
    "compute_environment: LOCAL_MACHINE\nnum_processes: '2; touch owned'",
    "compute_environment: AMAZON_SAGEMAKER",
]


@pytest.mark.parametrize("content", LAUNCHES, ids=range(len(LAUNCHES)))
def test_a_file_for_accelerate(survives, place, content):
    from pipeline.training.accelerate_launch import read_launch

    (place / "launch.yaml").write_text(content)
    assert survives(lambda: read_launch("launch.yaml")) and not (place / "owned").exists()


# What a model's `config.json` may say beside what it says.
SETTINGS = {
    "code": ({"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}, "code of its own, which is never run"),
    "code and a type of no kind": ({"auto_map": {"AutoConfig": "own.Own"}, "model_type": ["llama"]}, "code of its own"),
    "a kernel": ({"attn_implementation": "somebody/kernel"}, "names code to fetch and run"),
    "a kernel, hidden": ({"_attn_implementation": "somebody/kernel:f"}, "names code to fetch and run"),
    "a kernel, deep inside": ({"text_config": {"x": [{"_attn_implementation": "a/b"}]}}, "names code to fetch and run"),
    "kernels by part": ({"attn_implementation": {"": "a/b"}}, "names code to fetch and run"),
    "a kernel for experts": ({"experts_implementation": "a/b"}, "names code to fetch and run"),
    "quantization": ({"quantization_config": {"quant_method": ESCAPES}}, "already quantized"),
    "quantization of no kind": ({"quantization_config": [1]}, "already quantized"),
    "architectures of no kind": ({"architectures": [{"a": 1}]}, "only decoders that generate text"),
    "a type of no kind": ({"model_type": ["llama"]}, "cannot read its configuration"),
    "no type": ({"model_type": None}, "cannot read its configuration"),
    "a way as type": ({"model_type": "../../x"}, "cannot read its configuration"),
    "text for a number": ({"hidden_size": ESCAPES}, "cannot read its configuration"),
    "nothing to divide by": ({"num_attention_heads": 0}, "cannot"),
    "fewer than no words": ({"vocab_size": -1}, "cannot"),
    "no such function": ({"hidden_act": "__import__('os')"}, "cannot build this model"),
    "no such numbers": ({"dtype": "float99"}, "cannot"),
    "positions of no kind": ({"rope_parameters": 7}, "cannot"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_configuration_of_a_model(survives, place, tiny_model, name):
    from pipeline.models.matrices import linear_weights
    from pipeline.models.sources import check_source

    more, reason = SETTINGS[name]
    folder = own_copy(tiny_model, place)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | more))
    (folder / "own.py").write_text("open('owned', 'w')")

    def read():
        check_source(Model(source=str(folder)))
        linear_weights(folder)

    assert reason in survives(read) and not (place / "owned").exists()


TOKENIZERS = {
    "code": {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"},
    "code of another": {"auto_map": {"AutoTokenizer": "somebody/model--own.Own"}, "tokenizer_class": None},
    "code and a class of no kind": {"auto_map": {"AutoTokenizer": "own.Own"}, "tokenizer_class": ["Own"]},
    "a class of no kind": {"tokenizer_class": {"a": 1}},
    "special tokens of no kind": {"eos_token": 7, "additional_special_tokens": 9},
    "a length of no kind": {"model_max_length": "x", "padding_side": "up"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_settings_of_a_tokenizer(survives, place, tiny_model, name):
    from pipeline.inference.load import locate
    from pipeline.models.safe_loading import open_tokenizer

    folder = own_copy(tiny_model, place)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | TOKENIZERS[name]))
    (folder / "own.py").write_text("open('owned', 'w')")
    told = survives(lambda: open_tokenizer(folder))
    if "code" in name:
        assert "code of its own, which is never run" in told
        assert "code of its own, which is never run" in survives(lambda: locate(folder))
    assert not (place / "owned").exists()


@pytest.mark.parametrize("content", [b"", PICKLE, DEEP, b"{}", b'{"model": {"type": "x"}}', b"[]"], ids=range(6))
def test_a_tokenizer(survives, place, tiny_model, content):
    from pipeline.models.safe_loading import open_tokenizer

    folder = own_copy(tiny_model, place)
    (folder / "tokenizer.json").write_bytes(content)
    assert "cannot read its tokenizer" in survives(lambda: open_tokenizer(folder))


def test_a_tokenizer_that_can_do_without_its_code_is_published_without_it(place, tiny_model):
    from pipeline.models.checkpoint_files import copy_companions

    folder = own_copy(tiny_model, place)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    asks = content | {
        "auto_map": {"AutoTokenizer": "somebody/x--own.Own"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(asks))
    (place / "release").mkdir()
    copy_companions(folder, place / "release")
    assert "auto_map" not in json.loads((place / "release" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_link_to_a_private_file_is_not_published(survives, place, tiny_model, name):
    from pipeline.models.checkpoint_files import copy_companions

    (place.parent / "private").write_text("not for you")
    folder = own_copy(tiny_model, place)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(place.parent / "private")
    (place / "release").mkdir()
    assert "a link to" in survives(lambda: copy_companions(folder, place / "release"))
    assert not (place / "release" / name).exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_weights_that_are_pickles(survives, place, tiny_model, name):
    from pipeline.inference.load import load

    folder = own_copy(tiny_model, place)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / name).write_bytes(PICKLE)
    assert survives(lambda: load(folder)) and not (place / "owned").exists()


def test_training_does_not_open_a_pickle_either(survives, place, tiny_model):
    from pipeline.errors import ModelError
    from pipeline.training.nf4_base import load_base

    folder = own_copy(tiny_model, place)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)

    def train():
        try:
            load_base(folder, in_nf4=False)
        except OSError as error:
            raise ModelError(str(error)) from None

    assert "model.safetensors" in survives(train) and not (place / "owned").exists()


def test_an_adapter_beside_a_model_does_not_lead_to_another(survives, place, tiny_model):
    from pipeline.inference.load import locate
    from pipeline.models.sources import check_source

    folder = own_copy(tiny_model, place)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}')
    for call in (lambda: locate(folder), lambda: check_source(Model(source=str(folder)))):
        assert "an adapter_config.json lies beside the model" in survives(call)


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ lipsum.__globals__['os'].popen('touch owned').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ (messages|attr('append'))({}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for",
    "{{ 1 / 0 }}",
    "{{ 'a' * 10 ** 14 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ raise_exception('" + "x" * 100_000 + "') }}",
    f"{{{{ raise_exception('{TOKEN}') }}}}",
    "{{ messages[99].content }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ undefined.thing.of.things }}",
    ESCAPES,
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_chat_template(survives, place, tiny_model, template):
    from pipeline.data.chat import ChatTemplate
    from pipeline.models.safe_loading import open_tokenizer
    from pipeline.publishing.ollama_template import find_turns

    tokenizer = open_tokenizer(tiny_model("llama"))
    tokenizer.chat_template = template

    def render():
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        used = ChatTemplate(tokenizer)
        used.answers(talk, used.render(talk))

    assert survives(render)
    survives(lambda: find_turns(template, {"bos_token": "<s>"}, ""))
    assert not (place / "owned").exists()


FILES = [
    "../x.safetensors",
    "/etc/x.json",
    "a/../../x.json",
    "..json",
    "x.bin",
    "x.py",
    "x.pt",
    "x.pkl",
    "model.safetensors/x",
    "a/x.safetensors",
    "x.json\n",
    ".env",
    "adapter_config.json",
    "adapter_model.safetensors",
    "training_args.bin",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_a_repository_that_is_not_fetched(name):
    from pipeline.models.checkpoint_files import belongs_to_checkpoint

    assert not belongs_to_checkpoint(name) or name == "..json"


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "gguf/../../x-Q8_0.gguf", "a//x", "./x", "a\\x", "a\nb", ""])
def test_a_repository_with_a_name_that_leaves_its_folder_is_not_fetched(survives, name):
    from pipeline.hub.download import check_names

    assert "no name in a repository" in survives(lambda: check_names("user/model", ["config.json", name]))
    check_names("user/model", ["config.json", "int8/model.safetensors", ".gitattributes", "..json"])


EMPTY_LEDGER = {"steps": {}, "inputs": {}, "base": None, "comparison": None}
LEDGERS = ["../../private", "/etc/passwd", "release/../../../private", ".."]


@pytest.mark.parametrize("path", LEDGERS)
@pytest.mark.parametrize("folder", ["runs/tiny", "out/.tunepress"])
def test_a_ledger_that_names_files_of_others(survives, place, path, folder):
    from pipeline.workflow.workspace import Workspace

    (place / "private").write_text("x")
    workspace = Workspace(place / folder)
    workspace.folder.mkdir(parents=True)
    digest = {"sha256": "0" * 64, "size": 1, "mtime_ns": 1}
    entry = {"fingerprint": "", "outputs": {path: digest}, "summary": {}, "finished": 0, "seconds": 0}
    workspace.ledger_path.write_text(json.dumps({**EMPTY_LEDGER, "steps": {"quantize/int8": entry}}))
    assert "damaged" in survives(lambda: workspace.remove("quantize/int8", []))
    assert (place / "private").exists()


def test_audit_watch_detects_violations(place):
    with watching(place) as watch:
        (place / "inside").write_text("x")
        (place.parent / "outside").write_text("x")
        (place / "inside").rename(place.parent / "elsewhere")
        pickle.loads(pickle.dumps(os.path.join))
        os.system("true")
    told = " ".join(watch.seen)
    assert len(watch.seen) == 4 and all(w in told for w in ("outside", "elsewhere", "pickle.find_class", "os.system"))


def test_at_least_a_hundred_hostile_inputs_are_covered():
    """Of the kinds that may come from anywhere, each; what a configuration may be given is in `test_configurations`."""
    kinds = {
        "names": [*NAMES, *INDEXES, *FILES],
        "YAML": [*ANSWERS, *LAUNCHES],
        "JSONL": [name for name in DATA if name.endswith(".jsonl")],
        "other data": [name for name in DATA if not name.endswith(".jsonl")],
        "safetensors headers": WEIGHTS,
        "cards": CARDS,
        "GGUF headers": FILES_OF_LLAMA_CPP,
        "JSON of ours": [*LINEAGES, *LEDGERS],
        "adapters": ADAPTERS,
        "configurations of models": SETTINGS,
        "tokenizers": TOKENIZERS,
        "chat templates": TEMPLATES,
    }
    print({kind: len(inputs) for kind, inputs in kinds.items()})
    assert all(len(inputs) >= 5 for inputs in kinds.values())
    assert sum(len(kinds[kind]) for kind in ("names", "YAML", "JSONL", "safetensors headers", "cards")) >= 100


def own_copy(tiny_model, place):
    return shutil.copytree(tiny_model("llama"), place / "model")
