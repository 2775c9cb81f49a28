"""Merging and quantizing in one pass, and the reuse of what still holds."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.builders import merge_config
from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import linear_weights
from pipeline.quantization.writer import quantize_checkpoint
from pipeline.tracking.events import Events, read_events
from pipeline.workflow.stages import merge, quantize
from pipeline.workflow.workspace import Workspace
from tests.support.runs import Place, write_place


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory):
    """`adapter_of(model)`: the folder of a LoRA adapter for it, as somebody else would bring it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(model):
        folder = tmp_path_factory.mktemp("adapter")
        settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(folder)
        return folder

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def written_at(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def in_a_pass_of_its_own(model, spec, folder):
    """What is made of a full-precision model by reading it for the variant alone."""
    spec = VariantSpec.model_validate(spec).resolved()
    quantize_checkpoint(model, [spec], {spec.name: folder}, linear_weights(model))
    return contents(folder)


# -- whole runs


@pytest.mark.slow
def test_a_run_with_one_base_releases_what_two_passes_give_and_tells_it_in_order(tmp_path, tiny_model):
    place = write_place(tmp_path, tiny_model("llama"))
    place.tunepress("run", "tiny.yaml", "--set", "merge.base=nf4", "--set", "quantize.quality=fast")
    assert place.ledger()["merge"]["summary"] == {"base": "nf4", "variants": "int8, int4"}
    for name, spec in (("int8", "int8"), ("int4", {"name": "int4", "group_size": 128})):
        assert contents(place.release / name) == in_a_pass_of_its_own(place.release, spec, tmp_path / name)
        (written,) = written_at(place.release / name).values()
        assert written / 1e9 <= place.ledger()["merge"]["finished"]
        assert place.results()[name]["weights"]["source_bytes"] > place.results()[name]["weights"]["weight_bytes"] > 0
    assert place.names() == [
        "training_started", "training_completed", "merge_started", "merge_completed",
        "evaluation_started", "evaluation_completed", "quantization_started int8", "quantization_started int4",
        "quantization_completed int8", "quantization_completed int4",
    ]  # fmt: skip


@pytest.mark.parametrize("base", ["bf16", pytest.param("nf4", marks=pytest.mark.slow)])
def test_an_adapter_from_elsewhere_is_merged_and_quantized_at_once(tmp_path, tiny_model, adapter_of, base):
    model = tiny_model("qwen3")
    asked = ("merge", str(model), str(adapter_of(model)), "--output", "out", "--base", base)
    Place(tmp_path).tunepress(*asked, "--variants", "int8,int4", "--set", "track.project=tests")
    merged = Workspace(tmp_path / "out/.tunepress").ledger()["merge"]
    assert merged.summary == {"base": base, "variants": "int8, int4"}
    assert not any("quantized" in path for path in merged.outputs)  # a changed variant redoes no merge
    for name in ("int8", "int4"):
        assert contents(tmp_path / "out" / name) == in_a_pass_of_its_own(tmp_path / "out", name, tmp_path / name)


def test_failing_variant_stops_neither_merge_nor_other_variants(tmp_path, tiny_model, adapter_of):
    model, place = tiny_model("llama", intermediate_size=200), Place(tmp_path)  # no group size divides 200
    asked = ("merge", str(model), str(adapter_of(model)), "--output", "out", "--variants", "int4,int8")
    done = place.tunepress(*asked, "--set", "track.project=tests", check=2)
    assert "mlp.down_proj" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    events, _ = read_events(tmp_path / "out/.tunepress/events.jsonl")
    names = [" ".join(filter(None, (e["event"], e.get("variant")))) for e in events]
    assert names[:2] == ["merge_started", "merge_completed"] and names.count("quantization_failed int4") == 1
    assert names[-1] == "quantization_completed int8" and events[1]["variants"] == "int8"
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / "out/int4").exists()


# -- what the quantize stage takes, and what it makes again


class Stages:
    """The stages of one run, in this process."""

    def __init__(self, folder, model, adapter, *settings):
        self.config = merge_config(str(model), str(adapter), folder, variants=["int8,int4"], settings=settings)
        self.workspace = Workspace(folder)
        self.workspace.folder.mkdir(exist_ok=True)
        self.events = Events(self.workspace.events_path, "run")

    def merge(self):
        return merge.run(self.config, self.workspace, self.events, ())

    def quantize(self):
        """The files' contents by variant, once they are made; which of them were written by this very call."""
        before = {name: written_at(self.workspace.quantized / name) for name in ("int8", "int4")}
        outcome = quantize.run(self.config, self.workspace, self.events, ("int8", "int4"))
        assert outcome.summary == {"made": ["int8", "int4"], "refused": {}}
        after = {name: self.workspace.quantized / name for name in ("int8", "int4")}
        return {n: contents(f) for n, f in after.items()}, {n for n, f in after.items() if written_at(f) != before[n]}


@pytest.fixture
def merged(tmp_path, tiny_model, adapter_of):
    """A run whose merge is done, and with it its variants."""
    stages = Stages(tmp_path / "run", tiny_model("llama"), adapter_of(tiny_model("llama")))
    stages.merge()
    return stages


def test_variants_written_by_the_merge_are_used(merged):
    files, written = merged.quantize()
    assert written == set() and all("model.safetensors" in names for names in files.values())
    assert not list(merged.workspace.folder.rglob("*.partial"))


@pytest.mark.parametrize(
    "what, lose",
    [
        ("weights that are gone", lambda quantized: (quantized / "int4/model.safetensors").unlink()),
        ("a tokenizer that is gone", lambda quantized: (quantized / "int4/tokenizer.json").unlink()),
        ("a folder that is gone", lambda quantized: shutil.rmtree(quantized / "int4")),
        ("no note of what it is", lambda quantized: Workspace(quantized.parent).note("quantize/int4", written=None)),
        ("half of the weights", lambda quantized: cut(quantized / "int4/model.safetensors")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_lost_variants_are_made_again(merged, what, lose):
    whole = {name: contents(merged.workspace.quantized / name) for name in ("int8", "int4")}
    lose(merged.workspace.quantized)
    files, written = merged.quantize()
    assert written == {"int4"} and files == whole


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_changed_setting_redoes_its_variant_and_no_merge(merged, tmp_path):
    setting = "quantize.variants=[int8, {name: int4, group_size: 32, rounding: rtn}]"
    changed = Stages(tmp_path / "run", merged.config.model.source, merged.config.merge.adapter, setting)
    for stages in (merged, changed):
        stages.depends = merge.depends(stages.config, stages.workspace, ())
    assert merged.depends == changed.depends
    files, written = changed.quantize()
    assert written == {"int4"}
    again = {"name": "int4", "group_size": 32, "rounding": "rtn"}
    assert files["int4"] == in_a_pass_of_its_own(merged.workspace.release, again, tmp_path / "int4")
    assert changed.quantize()[1] == set()  # nor is that made twice, if it was not let in meanwhile


def test_changed_libraries_make_the_variant_again(merged, monkeypatch):
    monkeypatch.setattr(quantize, "versions", lambda *names: dict.fromkeys(names, "0"))
    assert merged.quantize()[1] == {"int8", "int4"}


def test_changed_merged_model_makes_the_variant_again(merged, tmp_path):
    before, _ = merged.quantize()
    weights = merged.workspace.release / "model.safetensors"
    tensors = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    files, written = merged.quantize()
    assert written == {"int8", "int4"} and files["int8"] != before["int8"]


def test_an_adapter_that_breaks_the_model_is_named_and_nothing_is_made(tmp_path, tiny_model, adapter_of):
    from pipeline.errors import ModelError

    adapter = adapter_of(tiny_model("llama"))
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    stages = Stages(tmp_path / "run", tiny_model("llama"), adapter)
    with pytest.raises(ModelError, match=f"{adapter.name}: makes values of .* that are not finite"):
        stages.merge()
    assert not list(stages.workspace.quantized.glob("*.json"))


def test_a_merge_that_ends_in_the_middle_leaves_nothing_to_be_taken(merged, monkeypatch):
    """Of an earlier merge either: its variants are not those of the model that comes."""
    from pipeline.training import merge as merging

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging.Adapter, "apply", stop)
    with pytest.raises(KeyboardInterrupt):
        merged.merge()
    assert not list(merged.workspace.quantized.rglob("*.safetensors*"))
    monkeypatch.undo()
    assert merged.quantize()[1] == {"int8", "int4"}


def test_two_bases_are_compared_before_variants_are_made(unpublished):
    assert "variants" not in unpublished.ledger()["merge"]["summary"]
    assert unpublished.ledger()["merge"]["summary"]["base"] in ("nf4", "bf16")
