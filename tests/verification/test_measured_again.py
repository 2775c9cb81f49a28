"""Measuring a release again in fresh processes, and running its snippets."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.data import general_text
from pipeline.data.encode import encode_text
from pipeline.evaluation import texts
from pipeline.evaluation.metrics import perplexity, score
from pipeline.inference.load import load
from pipeline.verification import Verdict
from pipeline.verification.check_files import check_files, sound_models
from pipeline.verification.lineage_claims import read_claims
from pipeline.verification.location import open_place
from pipeline.verification.measure_again import Cuts, find_texts, judged, request_for
from pipeline.verification.measure_process import look
from pipeline.verification.run_snippets import programs, run_examples
from tests.support.releases import TOPICS, line, told


def measured(release, model: str, folder: Path) -> list[str]:
    """The lines about one model, which is looked at in this process."""
    return all_measured(release, (model,), folder)


def all_measured(release, models: tuple[str, ...], folder: Path) -> list[str]:
    place = open_place(str(release.folder), None, lambda done, total, what: None)
    claims, cut, found = read_claims(place.lineage()), Cuts(), []
    texts = find_texts(claims, place, folder / "texts")
    for model in models:
        found += judged(claims, place, model, look(request_for(claims, place, model, texts)), cut)
    return [line(finding) for finding in (*found, *cut.findings())]


def test_untouched_release_is_confirmed_by_measuring(release):
    found = release.verify(measure=True)
    assert told(found) == [] and told(found, Verdict.unknown) == []
    right = told(found, Verdict.right)
    for model in ("merged", "int8", "int4"):
        assert any(line.startswith(f"measured {model}, general text: perplexity ") for line in right)
    stock, ours = "with stock libraries: runs", "with tunepress: runs"
    ran = [line for line in right if line.startswith("snippets ")]
    variants = [f"snippets {name}: {how}" for name in ("int8", "int4") for how in (stock, ours)]
    assert ran == [f"snippets merged: {stock}", *variants]
    assert "measured adapter: loads and runs" in right
    assert found.exit_code == 0


def test_release_of_an_earlier_version_is_measured_on_the_tokens_of_its_time(release, tmp_path):
    """General text was one running text, and no clusters were counted."""
    model, tokenizer = load(release.folder, device="cpu")
    sequences, told_now = encode_text(general_text(TOPICS), tokenizer, 32, 512), release.lineage()
    figures = told_now["results"]["merged"]["quality"]["general"]
    assert figures.pop("clusters") == 16 and figures.pop("freedom") == pytest.approx(15, abs=0.5)
    assert measured(release, "merged", tmp_path / "now")[0].startswith("measured merged, general text: perplexity ")
    before = figures["digest"]
    figures["digest"], figures["perplexity"] = texts.digest(sequences), asdict(perplexity(score(model, sequences)))
    assert figures["digest"] != before
    release.write_lineage(told_now)
    (found,) = measured(release, "merged", tmp_path / "then")
    assert found.startswith("measured merged, general text: perplexity ") and "cards" not in found


def test_changed_scales_with_rewritten_hash_are_measured(release, tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = release.folder / "int4/model.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name in tensors:
        if name.endswith("_weight_scale"):
            tensors[name] = tensors[name] * torch.tensor(1.3, dtype=tensors[name].dtype)
    save_file(tensors, path, metadata)
    release.own("int4/model.safetensors")
    assert told(release.verify()) == []
    (found,) = measured(release, "int4", tmp_path)
    assert found.startswith("measured int4, general text: perplexity is ") and "cards claim" in found


def test_false_figure_in_lineage_and_cards_is_measured(release, tmp_path):
    content = release.lineage()
    content["results"]["int8"]["quality"]["general"]["perplexity"]["value"] *= 0.9
    release.write_lineage(content)
    (found,) = measured(release, "int8", tmp_path)
    assert found.startswith("measured int8, general text: perplexity is ")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [("Int4WeightOnlyConfig", "Int3WeightOnlyConfig", "Int3WeightOnlyConfig"), ('"torchao"', '"torchao2"', "torchao2")],
)
def test_format_of_another_version_is_not_reported_as_damage(release, tmp_path, old, new, says):
    release.replace("int4/config.json", old, new)
    release.own("int4/config.json")
    (found,) = measured(release, "int4", tmp_path)
    assert (
        found.startswith("measured int4: not damaged, but made for other versions of the libraries") and says in found
    )
    command = f"tunepress quantize {release.folder} --output again --set 'quantize.variants=[" + '{"name": "int4"'
    assert command in found and '"group_size": 32' in found


def test_truncated_file_with_rewritten_hash_is_damage(release, tmp_path):
    path = release.folder / "int8/model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    release.own("int8/model.safetensors")
    (found,) = measured(release, "int8", tmp_path)
    assert found.startswith("measured int8: damaged, although its hash agrees with the lineage: ")
    assert found.endswith(f"tunepress quantize {release.folder} --output again --variants int8")


def test_adapter_that_does_not_fit_is_a_defect(release, tmp_path):
    release.replace("adapter/adapter_config.json", '"r": 4', '"r": 8')
    release.own("adapter/adapter_config.json")
    (found,) = measured(release, "adapter", tmp_path)
    assert found.startswith("measured adapter: ") and "rank 8" in found


def test_model_with_changed_files_is_not_loaded(release):
    release.replace("config.json", "LlamaForCausalLM", "OtherForCausalLM")
    place = open_place(str(release.folder), None, lambda done, total, what: None)
    claims = read_claims(place.lineage())
    assert sound_models(claims, check_files(claims, place)) == ["int8", "int4"]  # the adapter is loaded onto the root


def test_only_our_own_snippets_are_run(release, tmp_path):
    from pipeline.verification.check_cards import render

    evil = f"open({str(tmp_path / 'ran')!r}, 'w')"
    release.replace("int8/README.md", "```python\nimport torch", f"```python\n{evil}\nimport torch")
    place = open_place(str(release.folder), None, lambda done, total, what: None)
    claims = read_claims(place.lineage())
    (found,) = run_examples(claims, place, render(claims, place), ["int8"])
    assert line(found) == "snippets int8: not run: they do not follow from the lineage"
    claims = replace(claims, made_with={**claims.made_with, "tunepress": "0.0.1"})
    (found,) = run_examples(claims, place, render(claims, place), ["int8"])
    assert found.verdict is Verdict.unknown and "made with 0.0.1" in found.message
    assert not (tmp_path / "ran").exists()


def test_snippets_run_if_the_card_names_a_withheld_variant(release):
    from pipeline.verification.check_cards import render

    content = release.lineage()
    content["configuration"]["quantize"]["variants"].append({"name": "int8-dynamic"})
    missed = {"text": "general", "figure": "kl", "value": 0.5, "stderr": 0.01, "limit": 0.1, "passed": False}
    verdict = {"passed": False, "withheld": True, "limits": {"kl": 0.1}, "checks": [missed]}
    content["results"]["withheld"] = {"int8-dynamic": {**content["results"]["int8"], "gate": verdict}}
    release.write_lineage(content)
    release.rewrite_cards()
    assert "`int8-dynamic/` was **tried and withheld**" in release.read("README.md")
    place = open_place(str(release.folder), None, lambda done, total, what: None)
    claims = read_claims(place.lineage())
    assert told(release.verify()) == []
    found = [line(finding) for finding in run_examples(claims, place, render(claims, place), ["merged"])]
    assert found == ["snippets merged: with stock libraries: runs"]


def test_blocks_that_use_a_model_follow_each_block_that_loads_it():
    load, ours = "model = 1\ntokenizer = 2", "from pipeline import load\nmodel, tokenizer = load('x')"
    assert programs([load, ours, "print(model)"]) == [f"{load}\nprint(model)", f"{ours}\nprint(model)"]
    assert programs(["model = Llama()"]) == ["model = Llama()"]


def test_different_local_text_is_not_compared(release, tmp_path):
    content = json.loads(release.read("tunepress.json"))
    content["results"]["int8"]["quality"]["general"]["digest"] = "other"
    release.write_lineage(content)
    (found,) = measured(release, "int8", tmp_path)
    assert "not compared: other tokens here" in found


def test_changed_tokenizer_with_rewritten_hash_is_found(release, tmp_path):
    path = "int4/tokenizer.json"
    content = json.loads(release.read(path))
    words = content["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    release.write(path, json.dumps(content))
    release.own(path)
    found = all_measured(release, ("merged", "int4"), tmp_path)
    assert found[-1] == ("measured int4, general text: other tokens than with the other models: another tokenizer")


def test_gguf_is_measured_again_in_llama_cpp(release, tmp_path):
    pytest.importorskip("llama_cpp")
    from pipeline.config.schema import VariantSpec
    from pipeline.models.matrices import linear_weights, table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    name, path, root = "gguf-q8_0", "gguf/demo-Q8_0.gguf", release.folder
    spec, to = VariantSpec(name=name).resolved(), {name: root / "gguf"}
    quantize_checkpoint(root, [spec], to, linear_weights(root), tables=table_weights(root), name="demo")
    release.own(path)
    content = release.lineage()
    content["configuration"]["quantize"]["variants"].append(spec.model_dump())
    content["results"][name] = {"file": "demo-Q8_0.gguf", "loader": "llama.cpp"}
    content["results"][name]["quality"] = content["results"]["merged"]["quality"]  # eight bits are as good, nearly
    release.write_lineage(content)
    (found,) = measured(release, name, tmp_path / "first")
    assert found.startswith(f"measured {name}, general text: perplexity ") and "claimed" in found
    data = (root / path).read_bytes()
    release.write(path, data[:-1000])
    release.own(path)
    (found,) = measured(release, name, tmp_path / "second")
    assert found.startswith(f"measured {name}: damaged, although its hash agrees with the lineage: ")
