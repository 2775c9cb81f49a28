"""Settings and links of models from anywhere that lead to a private file: it is not read."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest

from pipeline.config.schema import Model
from tests.support.audit_watch import BAIT, PASSWORD, SECRETS
from tests.support.hostile_models import LEADS, lead_to, settings_of


@pytest.fixture
def model(tiny_model, place) -> Path:
    return shutil.copytree(tiny_model("llama"), place / "model")


@pytest.mark.parametrize("name", LEADS)
def test_model_that_leads_to_a_private_file_is_refused(survives, model, name):
    from pipeline.inference.load import load
    from pipeline.models.matrices import linear_weights
    from pipeline.models.safe_loading import open_model, open_tokenizer
    from pipeline.models.sources import check_source

    lead_to(model, name)
    reason = LEADS[name].reason
    assert reason in survives(lambda: check_source(Model(source=str(model))))
    assert reason in survives(lambda: load(model))
    if LEADS[name].of_tokenizer:
        assert reason in survives(lambda: open_tokenizer(model))
    else:
        assert reason in survives(lambda: open_model(model, dtype="auto"))
    if name == "another configuration":
        assert reason in survives(lambda: linear_weights(model))


def test_plain_settings_of_another_model_are_refused(survives, model):
    """A configuration that is not in a file, as planning has it."""
    from pipeline.models.matrices import embedding_kind

    more = {"configuration_files": ["config.4.0.0.json"], "model_type": "gpt_neo"}
    assert "names files to read instead" in survives(lambda: embedding_kind(more))


@pytest.mark.parametrize("name", ["AutoProcessor", "AutoTokenizer", "RagTokenizer", "AutoModel", "pipeline"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_tokenizer_class_is_a_tokenizer(survives, model, name, file):
    """Anything else that transformers has opens other files, with other rules about code."""
    from pipeline.models.safe_loading import open_tokenizer

    settings_of(model, "tokenizer_config.json", tokenizer_class=None)
    settings_of(model, file, tokenizer_class=name)
    assert "is not a tokenizer" in survives(lambda: open_tokenizer(model))


def test_leftover_names_of_files_are_neither_opened_nor_published(survives, model, place, tiny_model):
    from pipeline.models.checkpoint_files import copy_companions
    from pipeline.models.safe_loading import open_tokenizer

    bait = str(place.parent / BAIT)
    leftovers = {
        "name_or_path": bait, "tokenizer_file": bait, "special_tokens_map_file": bait, "vocab_file": bait,
        "merges_file": bait, "source_spm": bait, "sp_model_kwargs": {}, "init_inputs": [], "unheard_of": bait,
    }  # fmt: skip
    settings_of(model, "tokenizer_config.json", **leftovers)
    found = {}
    survives(lambda: found.update(tokenizer=open_tokenizer(model)))
    tokenizer, plain = found["tokenizer"], open_tokenizer(tiny_model("llama"))
    assert tokenizer("Is it a <|im_end|>?")["input_ids"] == plain("Is it a <|im_end|>?")["input_ids"]
    assert tokenizer.name_or_path == str(model) and "tunepress-tokenizer" not in repr(tokenizer.init_kwargs)
    (place / "release").mkdir()
    copy_companions(model, place / "release")
    assert bait not in (place / "release" / "tokenizer_config.json").read_text().replace('"unheard_of": "' + bait, "")


def test_settings_without_leftovers_are_published_as_they_are(model, place):
    from pipeline.models.checkpoint_files import copy_companions

    settings = '{"tokenizer_class":"PreTrainedTokenizerFast", "tool_parser_type": "json", "eos_token": "<|im_end|>"}'
    (model / "tokenizer_config.json").write_text(settings)
    (place / "release").mkdir()
    copy_companions(model, place / "release")
    assert (place / "release" / "tokenizer_config.json").read_text() == settings


def test_links_within_a_folder_and_of_weights_are_followed(survives, model, place):
    """People put weights elsewhere, and the Hub's cache consists of links."""
    from pipeline.inference.load import load

    (model / "model.safetensors").rename(place / "weights.safetensors")
    (model / "model.safetensors").symlink_to(place / "weights.safetensors")
    snapshot = place / "models--ada--tiny" / "snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for folder in (snapshot, snapshot / "int8"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in model.iterdir():
            shutil.copyfile(path, blobs / path.name)
            (folder / path.name).symlink_to(blobs / path.name)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(blobs / "tokenizer.json")  # as older clients of the Hub download a folder
    for folder in (model, snapshot, snapshot / "int8"):
        assert survives(lambda folder=folder: load(folder)) is None


@pytest.mark.slow  # imports every tokenizer
def test_no_tokenizer_of_transformers_opens_a_file_by_a_setting_that_passes(survives, model, place):
    """Every class of the installed transformers, with every argument that it has."""
    from transformers.models.auto import tokenization_auto

    from pipeline.models.safe_loading import open_tokenizer

    bait, told, found = str(place.parent / BAIT), {}, {}
    (model / "tokenizer.json").unlink()
    for name in sorted({name for name in tokenization_auto.TOKENIZER_MAPPING_NAMES.values() if name}):
        own = tokenization_auto.tokenizer_class_from_name(name)
        if own is None or getattr(own, "is_dummy", False):
            continue
        refused = ("self", "args", "kwargs", "vocab", "merges", "sp_model_kwargs")
        keys = [key for key in inspect.signature(own.__init__).parameters if key not in refused]
        settings = dict.fromkeys(keys, bait) | {"tokenizer_class": name, "padding_side": "left"}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        told[name] = survives(lambda name=name: found.update({name: open_tokenizer(model)}))
    assert len(told) > 50 and len(found) > 10, told
    assert not [name for name, tokenizer in found.items() if PASSWORD in tokenizer.get_vocab()]


def test_generation_settings_open_no_file(survives, model, place):
    from pipeline.inference.load import load
    from pipeline.models.safe_loading import open_generation_config

    keys = ("custom_generate", "generation_config", "tokenizer_file", "configuration_files")
    settings = {"eos_token_id": 7} | dict.fromkeys(keys, str(place.parent / BAIT))
    (model / "generation_config.json").write_text(json.dumps(settings))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text("open('owned', 'w')")
    assert survives(lambda: load(model)) is None
    assert survives(lambda: open_generation_config(model)) is None
    assert not (place / "owned").exists()


@pytest.mark.parametrize("settings", ['{"cache_implementation": "x"}', "[]", "[" * 200_000, '{"max_new_tokens": "x"}'])
def test_unusable_generation_settings_are_refused(survives, model, settings):
    from pipeline.evaluation.generation import stop_tokens

    (model / "generation_config.json").write_text(settings)
    assert "generation" in survives(lambda: stop_tokens(model))


@pytest.mark.parametrize("file", ["../model.safetensors", "/tmp/model.safetensors", "other/model.safetensors"])
def test_index_of_weights_elsewhere_is_refused(survives, model, file):
    from pipeline.inference.load import load
    from pipeline.models.safe_loading import open_model

    (model / "model.safetensors").rename(model.parent / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    for call in (lambda: load(model), lambda: open_model(model, dtype="auto")):
        assert "is not the name of a file in this folder" in survives(call)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin"])
def test_link_to_a_device_is_refused(survives, model, name, device):
    from pipeline.inference.load import load

    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(device)
    survives(lambda: load(model))


def test_linked_folder_of_chat_templates_is_refused(survives, model, place):
    from pipeline.models.chat_templates import chat_templates
    from pipeline.models.safe_loading import open_tokenizer

    (place / "mine").mkdir()
    (place / "mine" / "tools.jinja").write_text(PASSWORD)
    (model / "additional_chat_templates").symlink_to(place / "mine")
    for call in (lambda: open_tokenizer(model), lambda: chat_templates(model)):
        assert "a link to" in survives(call)


def test_process_that_opens_a_model_has_no_token(place, monkeypatch, cold):
    """Should a model get to run code after all, there is nothing to take."""
    from pipeline.publishing.snippets import run

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    done = run("import os; print(dict(os.environ))", place)
    assert "'HF_TOKEN_PATH': '/dev/null'" in done.stdout, done.stderr  # instead of the token of a login
    assert not any(secret in done.stdout for secret in (*SECRETS, "0123456789abcdef0123"))
