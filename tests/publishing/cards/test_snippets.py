"""Snippets on cards: they run as printed, with stock libraries, and compute what the files hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import linear_weights
from pipeline.publishing import snippets as snippets_of_cards
from pipeline.publishing.cards import folder_card, mirror_card, model_card
from pipeline.publishing.snippets import blocks
from tests.support.sample import BOTH, about, config, gguf_about, replaced, results

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("torchao")

PROMPT = list(range(40, 72))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KEEP_LOGITS = """
with torch.no_grad():
    torch.save(model(torch.tensor([{ids}], device=device)).logits.float().cpu(), "logits.pt")
print("layers:", sorted({{type(m.weight).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)}}))
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A tiny random Llama at the root and its variants in folders, as a run leaves them."""
    from pipeline.quantization.writer import quantize_checkpoint

    folder = tmp_path_factory.mktemp("release")
    _tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=1,  # so that k and v have 8 rows, which the CPU's kernel does not take
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    specs = [VariantSpec(name="int8").resolved(), VariantSpec(name="int4", group_size=32).resolved()]
    output = {spec.name: folder / spec.name for spec in specs}
    for made in output.values():
        made.mkdir()
    quantize_checkpoint(folder, specs, output, linear_weights(folder))
    tiled = VariantSpec(name="int4", group_size=32, packing="tile_packed").resolved()
    quantize_checkpoint(folder, [tiled], {"int4": folder / "tiled" / "int4"}, linear_weights(folder))
    return folder


@pytest.fixture(scope="module")
def snippets(release) -> dict[str, list[str]]:
    """What the card of the release says to run, by what it loads; each followed by what follows in the card."""
    given = about(location=str(release), config=config(evaluate={"prompts": ["Who are you?"]}))
    *loading, generate, chat = blocks(model_card(given, BOTH))
    names = ("root", *BOTH, "pipeline.load")
    return {name: [load, generate, chat] for name, load in zip(names, loading, strict=True)}


def run(code: str, folder: Path, with_tunepress: bool = False, more: dict | None = None) -> str:
    """What `code` prints."""
    done = snippets_of_cards.run(code, folder, with_tunepress, more, seconds=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_card_has_the_same_snippets_for_what_it_is_about(snippets, release):
    given = about(location=str(release), config=config(evaluate={"prompts": ["Who are you?"]}))
    for variant in BOTH:
        load, shorter, *rest = blocks(folder_card(given, [variant]))
        assert [load, *rest] == snippets[variant]
        assert shorter.replace(variant, "int4") == snippets["pipeline.load"][0]
        assert "pipeline import load" not in load and "trust_remote_code" not in load
        mirrored = blocks(mirror_card(given, variant, "user/mirror"))
        assert mirrored[0] == load.replace(f', subfolder="{variant}"', "").replace(str(release), "user/mirror")
        assert mirrored[1].endswith('load("user/mirror")') and mirrored[2:] == rest


def test_without_a_chat_template_no_chat_is_shown(release):
    given = about(location=str(release), chats=False)
    for text in (model_card(given, BOTH), folder_card(given, ["int4"]), mirror_card(given, "int4", "user/mirror")):
        assert "chat" not in "".join(blocks(text)) and "has no chat template" in text


@pytest.mark.parametrize("name", ["root", "int8", "pipeline.load"])
def test_each_model_loads_answers_and_converses(snippets, tmp_path, name):
    counted = "print('said:', len(messages), {m['role'] for m in messages})"
    printed = run("\n".join([*snippets[name], counted]), tmp_path, with_tunepress=name == "pipeline.load")
    said, _, rest = printed.rpartition("said:")
    assert said.strip() and rest.startswith(" 4 ")


def test_a_mirror_loads_from_its_root_and_continues_text(release, tmp_path):
    given = about(location=str(release), config=config(evaluate={"prompts": ["Who are you?"]}), chats=False)
    load, _, generate = blocks(mirror_card(given, "int8", str(release / "int8")))
    assert run(f"{load}\n{generate}", tmp_path).strip()


def test_the_int4_snippet_computes_what_the_dequantized_weights_do(snippets, release, tmp_path):
    printed = run("\n".join([*snippets["int4"], KEEP_LOGITS.format(ids=PROMPT)]), tmp_path)
    answers, _, layers = printed.rpartition("layers:")
    assert answers.strip()
    if not torch.cuda.is_available():
        assert layers.split() == ["['Int4OpaqueTensor',", "'Parameter']"]
    _check_logits(tmp_path / "logits.pt", release / "int4")


def test_the_snippet_for_tiles_runs_them_on_a_card_and_repacks_them_elsewhere(release, tmp_path):
    found = replaced(results(), ("int4", "variant", "packing"), "tile_packed")
    found = replaced(found, ("int4", "weights", "padding_bytes"), 2_000_000)
    card = folder_card(about(found, location=str(release / "tiled")), ["int4"])
    assert "can compute with it unchanged" in card and "mslk` is installed" not in card
    assert "CUDA cards read, 2.00\u00a0MB of them to fill up rows and columns" in card
    printed = run("\n".join([blocks(card)[0], KEEP_LOGITS.format(ids=PROMPT)]), tmp_path)
    if torch.cuda.is_available():
        assert printed.split() == ["layers:", "['Int4TilePackedTo4dTensor',", "'Parameter']"]
    else:
        assert printed.split() == ["layers:", "['Int4OpaqueTensor',", "'Parameter']"]
    _check_logits(tmp_path / "logits.pt", release / "int4")


def _check_logits(path: Path, folder: Path) -> None:
    exact = _dequantized(folder, torch.float32)
    ours, rounded = torch.load(path) - exact, _dequantized(folder, torch.bfloat16) - exact
    assert 0 < rounded.norm() < 0.05 * exact.norm()
    assert ours.norm() < 1.5 * rounded.norm()  # no further off than arithmetic in bf16 is anyway


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_int4_snippet_takes_int8_embeddings_too(release, tmp_path, tied):
    from pipeline.models.matrices import table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    model = transformers.AutoModelForCausalLM.from_pretrained(release, dtype="auto", tie_word_embeddings=tied)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    spec, made = VariantSpec(name="int4", group_size=32, embeddings="int8").resolved(), {"int4": tmp_path / "int4"}
    quantize_checkpoint(tmp_path, [spec], made, linear_weights(tmp_path), tables=table_weights(tmp_path))
    found = results()
    found["int4"]["variant"]["embeddings"] = "int8"
    load, *_ = blocks(folder_card(about(found, location=str(tmp_path)), ["int4"]))
    printed = run("\n".join([load, KEEP_LOGITS.format(ids=PROMPT)]), tmp_path)
    if not torch.cuda.is_available():
        assert printed.split() == ["layers:", "['Int4OpaqueTensor',", "'Parameter']"]
    exact = pipeline_logits(tmp_path / "int4")
    assert (torch.load(tmp_path / "logits.pt") - exact).norm() < 0.05 * exact.norm()


def pipeline_logits(folder: Path):
    from pipeline.inference.load import load

    with torch.no_grad():
        return load(folder, device="cpu")[0](torch.tensor([PROMPT])).logits.float()


def _dequantized(folder: Path, dtype):
    """Logits with ordinary weights, from the numbers in the files and not by any kernel for int4."""
    from pipeline.quantization.formats import storage

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    replaced = 0
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            codes = storage("torchao").unpack(layer.weight.data)
            if codes is not None:
                layer.weight = torch.nn.Parameter(codes.dequantize(dtype), requires_grad=False)
                replaced += 1
    assert replaced == 14
    model.to(dtype)
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits.float()


@pytest.fixture(scope="module")
def gguf(release) -> Path:
    """A variant of GGUF in the same release."""
    pytest.importorskip("gguf")
    from pipeline.models.matrices import table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    spec, made = VariantSpec(name="gguf-q8_0").resolved(), {"gguf-q8_0": release / "gguf"}
    quantize_checkpoint(release, [spec], made, linear_weights(release), tables=table_weights(release), name="demo")
    return release / "gguf" / "demo-Q8_0.gguf"


@pytest.mark.parametrize("chats", [True, False], ids=["chat", "text"])
def test_the_gguf_snippet_answers_from_a_folder(gguf, release, tmp_path, chats):
    pytest.importorskip("llama_cpp")
    given = gguf_about(location=str(release), chats=chats, config=config(evaluate={"prompts": ["Who are you?"]}))
    (code,) = blocks(folder_card(given, ["gguf-q8_0"]))
    assert code in model_card(given, [*BOTH, "gguf-q8_0"]) and "huggingface_hub" not in code
    assert run(code + "\nprint('asked', len(answer['choices']))", tmp_path).endswith("asked 1\n")


def test_the_gguf_snippet_fetches_one_file_from_the_hub(gguf, tmp_path):
    pytest.importorskip("llama_cpp")
    from tests.support.hub import LoopbackHub

    with LoopbackHub(tmp_path / "hub", {"hf_aTokenForTheseTests0123": {"name": "user"}}) as hub:
        hub.put("user/a-model", {"gguf/demo-Q8_0.gguf": gguf.read_bytes(), "README.md": b"x"})
        hub.put("user/small", {"demo-Q8_0.gguf": gguf.read_bytes()})
        online = hub.env_for("hf_aTokenForTheseTests0123", home=tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        for card in (folder_card(gguf_about(), ["gguf-q8_0"]), mirror_card(gguf_about(), "gguf-q8_0", "user/small")):
            (code,) = blocks(card)
            assert run(code + "\nprint('asked', len(answer['choices']))", tmp_path, more=online).endswith("asked 1\n")
    assert not list((tmp_path / "home").rglob("README.md"))


def _tokenizer():
    """One token a byte, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = CHATML
    return fast
